"""benchmarks/videos: runs train from end to end on synthetic frames, and its questions need the order of frames."""

from collections import Counter

import pytest
import torch

from benchmarks.results import read_results
from benchmarks.videos import __main__ as videos
from benchmarks.videos import clips
from benchmarks.videos.clips import EMOJI, FRAMES, MOMENTS_ORDER, TONES, compose
from modeling_evlgen.video_merging import add_frames, place_frames

from .helpers import save_towers


@pytest.fixture
def synthetic(monkeypatch, tmp_path):
    """A few videos of random features, tiny towers, and an empty file of results."""
    towers = save_towers(tmp_path, "timm_cnn")
    torch.manual_seed(0)
    frames = {split: torch.randn(len(EMOJI) * tones * FRAMES, 196, 112).half() for split, tones in TONES.items()}
    monkeypatch.setattr(clips, "SHORT_VIDEOS", {"train": 20, "test": 20})
    for module in (clips, videos):
        monkeypatch.setattr(module, "BACKGROUND_VIDEOS", {split: {8: 6, 16: 6} for split in TONES})
    monkeypatch.setattr(videos, "load_frames", lambda: frames)
    monkeypatch.setattr(videos, "prepare_vision_tower", lambda: towers["vision_model"])
    monkeypatch.setattr(videos, "prepare_language_model", lambda: towers["text_model"])
    monkeypatch.setattr(videos, "RESULTS", tmp_path / "results.jsonl")
    videos.merge_split.cache_clear()


@pytest.mark.parametrize("connector", videos.CONNECTORS)
def test_methods_are_trained_measured_and_compared(connector, synthetic, monkeypatch, capsys):
    monkeypatch.setattr(videos.Run.__init__, "__defaults__", (0, 1))  # one step
    methods = [videos.TIMELESS, videos.MERGE]
    videos.main(["--connector", connector, "--methods", *methods])
    kinds = {text["kind"] for text in compose("test")[1]}
    results = read_results(videos.RESULTS).values()
    assert [result["run"]["method"] for result in results] == methods
    assert all(result["held_out"].keys() == kinds for result in results)
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {connector} | {method} | 1 |") == 3 for method in methods)

    monkeypatch.setattr(videos, "train", pytest.fail)  # a finished run is not trained again
    videos.main(["--connector", connector, "--methods", *methods])


@pytest.mark.parametrize("split", TONES)
def test_without_order_half_of_the_answers_are_right(split):
    """The videos of a pair show the same emoji, and get the same questions with other answers."""
    videos_of_split, texts = compose(split)
    answers = Counter()
    for text in texts:
        if text["kind"] == "which first" or text["kind"].startswith(MOMENTS_ORDER):
            answers[text["clip"] // 2, text["question"], text["answer"]] += 1
            pair = (videos_of_split[clip] for clip in (text["clip"], text["clip"] ^ 1))
            one, other = ({frame // (FRAMES * TONES[split]) for frame in clip} for clip in pair)
            assert one == other
    by_question = {key[:2] for key in answers}
    assert len(answers) == 2 * len(by_question) and len(set(answers.values())) <= 2


def test_videos_are_merged_as_the_model_merges_them():
    """Also those of more frames than are merged at once."""
    torch.manual_seed(0)
    frames, chosen = torch.randn(5, 16, 8), torch.randint(5, (2, 11))
    pool = videos.merge_clips(frames, chosen)
    for video, features, places in zip(chosen, pool.features, pool.places, strict=True):
        placed = place_frames(frames[video], torch.arange(11.0), class_token=False)
        expected = add_frames(None, placed, [torch.tensor([0])] * 11, class_token=False)
        torch.testing.assert_close(features, expected.features[0])
        torch.testing.assert_close(places, expected.places[0])
