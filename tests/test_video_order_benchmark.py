"""The comparison of pooled videos whose order matters runs from end to end, on synthetic frames."""

import json
from collections import Counter

import pytest
import torch
from huggingface_hub import constants

from benchmarks.video_order import __main__ as video_order
from benchmarks.video_order import order_run, ordered_clips
from benchmarks.video_order.clip_pooling import PARTS_MEANS, TIMELESS, pool_merge
from benchmarks.video_order.emoji_frames import EMOJI, FRAMES, TONES
from benchmarks.video_order.frame_blocks import CONTEXTUALIZERS, POSITIONS, FrameBlocks
from benchmarks.video_order.order_run import OrderRun
from benchmarks.video_order.ordered_clips import MOMENT, MOMENTS_ORDER, compose
from modeling_evlgen.video_merging import add_frames, place_frames

TRAINED = (PARTS_MEANS, TIMELESS)


@pytest.fixture
def few_videos(monkeypatch):
    """A few videos of 8 to 16 frames."""
    monkeypatch.setattr(ordered_clips, "SHORT_VIDEOS", {"train": 20, "test": 20})
    for module in (ordered_clips, video_order):
        monkeypatch.setattr(module, "BACKGROUND_VIDEOS", {split: {8: 6, 16: 6} for split in TONES})


@pytest.fixture
def synthetic_frames(monkeypatch, tmp_path):
    """Random features of 49 tokens in place of the emoji of the npm package."""
    torch.manual_seed(0)
    frames = {split: torch.randn(len(EMOJI), tones, FRAMES, 49, 112).half() for split, tones in TONES.items()}
    monkeypatch.setattr(order_run, "load_frames", lambda: frames)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(video_order, "RESULTS", tmp_path / "results.jsonl")


def test_methods_are_trained_measured_and_compared(few_videos, synthetic_frames, monkeypatch, capsys):
    plan = [OrderRun(method, steps=1) for method in TRAINED]
    monkeypatch.setattr(video_order, "PLAN", plan)
    video_order.main([])
    results = [json.loads(line) for line in video_order.RESULTS.read_text().splitlines()]
    assert [OrderRun(**result["run"]) for result in results] == plan
    kinds = {text["kind"] for text in compose("test")[1]}
    assert all(result["held_out"].keys() == kinds for result in results)
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {method} | 1 |") == 3 for method in TRAINED)

    monkeypatch.setattr(video_order, "train", pytest.fail)  # a finished run is not trained again
    video_order.main([])


@pytest.mark.parametrize("split", TONES)
def test_without_order_half_of_the_answers_are_right(split):
    """The videos of a pair show the same frames' emoji, and get the same questions with other answers."""
    clips, texts = compose(split)
    answers = Counter()
    for text in texts:
        if text["kind"] == "which first" or text["kind"].startswith(MOMENTS_ORDER):
            answers[text["clip"] // 2, text["question"], text["answer"]] += 1
            assert sorted(clips[text["clip"]].events) == sorted(clips[text["clip"] ^ 1].events)
    by_question = {key[:2] for key in answers}
    assert len(answers) == 2 * len(by_question) and len(set(answers.values())) <= 2


def test_pairs_of_the_test_split_never_meet_in_training(few_videos):
    def meetings(split):
        per_emoji = TONES[split] * FRAMES
        shown = [sorted({frame // per_emoji for frame in clip.frames}) for clip in compose(split)[0]]
        return [{(a, b) for a in emoji for b in emoji if a < b} for emoji in shown if len(emoji) > 1]

    trained = set().union(*meetings("train"))
    assert trained and all(pairs - trained for pairs in meetings("test"))


def test_an_important_frame_is_single_at_every_length():
    clips, texts = compose("test")
    lengths = Counter()
    for text in texts:
        if text["kind"].startswith(MOMENT):
            clip = clips[text["clip"]]
            emoji = Counter(frame // FRAMES for frame in clip.frames)  # one tone
            lengths[len(clip.frames)] += 1
            assert len(emoji) == 2 and emoji[clip.events[0]] == 1 and EMOJI[clip.events[0]] in text["answer"]
    assert lengths == {length: 2 * count // 3 for length, count in ordered_clips.BACKGROUND_VIDEOS["test"].items()}


def test_videos_are_merged_as_the_model_merges_them():
    """Also those of more frames than are merged at once."""
    torch.manual_seed(0)
    frames, chosen = torch.randn(5, 16, 8), torch.randint(5, (2, 11))
    pooled = pool_merge(frames, chosen)
    for video, features, places in zip(chosen, *pooled.values(), strict=True):
        placed = place_frames(frames[video], torch.arange(11.0), class_token=False)
        expected = add_frames(None, placed, [torch.tensor([0])] * 11, class_token=False)
        torch.testing.assert_close(features, expected.features[0].half())
        torch.testing.assert_close(places, expected.places[0])


def test_contextualizers_are_trained_with_the_connector(few_videos, synthetic_frames, monkeypatch):
    built = []
    monkeypatch.setattr(order_run, "TRAINING_BATCH", 4)
    monkeypatch.setattr(order_run, "FrameBlocks", lambda *args: built.append(FrameBlocks(*args)) or built[0])
    result = order_run.train(OrderRun(POSITIONS, steps=2))
    assert result["held_out"].keys() == {text["kind"] for text in compose("test")[1]}
    assert all(contextualizer.alpha != 0 for contextualizer in built[0].temporal)


def test_frame_blocks_start_as_the_mean_of_frames():
    torch.manual_seed(0)
    videos = [torch.randn(length, 4, 8) for length in (3, 5, 3, 200)]
    means = torch.stack([video.mean(dim=0) for video in videos])
    torch.testing.assert_close(FrameBlocks(torch.cat(videos), True)(videos), means)


@pytest.mark.parametrize("method", CONTEXTUALIZERS)
def test_frames_see_those_of_their_own_video_and_their_order_if_they_have_positions(method):
    torch.manual_seed(0)
    videos = [torch.randn(length, 4, 8) for length in (3, 5, 3, 200, 200)]
    blocks = FrameBlocks(torch.cat(videos), method == POSITIONS)
    for weight in blocks.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    with torch.no_grad():
        together = blocks(videos)
        alone = torch.cat([blocks([video]) for video in videos])
        in_reverse = blocks([video.flip(0) for video in videos])
    torch.testing.assert_close(together, alone)
    assert torch.allclose(in_reverse, together, atol=1e-4) != (method == POSITIONS)


def test_an_answer_is_right_if_greedy_generation_gives_it(few_videos, synthetic_frames):
    features = torch.randn(2, 49, 112)
    texts = [
        {"clip": index, "question": "What is shown?", "answer": text}
        for index, text in enumerate(("an ear", "a girl"))
    ]
    data = order_run.ClipTexts(texts, {"features": features})
    torch.manual_seed(0)
    model, processor = order_run.build_captioner({"train": data})
    collator = order_run.ClipCollator(processor)
    batch = collator([data[0], data[1]])
    order_run.optimize(model.train(), iter([batch] * 8), 8)
    wrong = order_run.ClipTexts([texts[0], {**texts[1], "answer": "a ear"}], data.pooled)
    loaders = [torch.utils.data.DataLoader(rows, 2, collate_fn=collator) for rows in (data, wrong)]
    right = [order_run.find_right_answers(model.eval(), loader) for loader in loaders]
    prompts = processor(vision_features=features, text=["What is shown?"] * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generated = model.generate(**prompts, max_new_tokens=5)[:, prompts["input_ids"].shape[1] :]
    answers = processor.batch_decode(generated, skip_special_tokens=True)
    assert answers == ["an ear", "a girl"] and right == [[True, True], [True, False]]
