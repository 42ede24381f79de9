"""Cached features of videos: those of their frames, with the places of merged tokens, and the same loss."""

import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants

from common.arguments import DataArguments, parse_arguments
from common.data import feature_cache
from common.data.collator import CaptionCollator
from common.data.feature_cache import cache_features, cache_split
from common.data.loading import check_arguments
from common.evaluation.captions import WrongImages
from modeling_evlgen import video_merging

from .helpers import merging_model, noise_images, save_animation, tiny_model, tiny_processor
from .test_features import Tower
from .test_processing import conversation

LENGTHS = (1, 6, 3, 9)
MODELS = {"mean": tiny_model, "merge": merging_model}


@pytest.fixture(autouse=True)
def a_fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "PART_VIDEOS", 1)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture
def rows(tmp_path):
    """Four videos of different lengths, in which frames last 100, 200, 300 … ms."""
    frames, paths = noise_images(max(LENGTHS)), []
    for index, length in enumerate(LENGTHS):
        paths.append(str(tmp_path / f"{index}.webp"))
        shown = frames[:length] if index % 2 else frames[-length:]
        save_animation(paths[-1], shown, duration=[100 * (number + 1) for number in range(length)])
    return Dataset.from_dict({"video": paths, "caption": ["a cat", "a dog", "a red hat", "nothing"]})


def arguments(**changes):
    return DataArguments(**{"video_column": "video", "fps": 3.0, "cache_features": True, **changes})


def cached(rows, mode="merge", **changes):
    model = MODELS[mode]()
    return cache_split(model, rows, CaptionCollator(tiny_processor(model), arguments(**changes), training=False))


def values(dataset):
    return [(np.array(row["vision_features"]), np.array(row.get("token_places"))) for row in dataset]


def equal(one, other):
    return all(map(np.array_equal, sum(values(one), ()), sum(values(other), ())))


@pytest.mark.parametrize("mode", MODELS)
@pytest.mark.parametrize("frames", [{"fps": 3.0}, {"fps": None, "num_frames": 4}])
@torch.no_grad()
def test_the_loss_and_the_captions_are_those_without_a_cache(mode, frames, rows, monkeypatch):
    model = MODELS[mode]().eval()
    processor = tiny_processor(model)
    processor.max_tiles = 4  # for images alone
    collator = CaptionCollator(processor, arguments(**frames), training=False)
    _, cache = cache_features(model, processor, rows, rows, arguments(**frames, cached_views=1), seed=0)
    chosen = [3, 0, 2, 1]
    batches = [collator([dataset[row] for row in chosen]) for dataset in (rows, cache)]
    prompts = [collator.prompts([dataset[row] for row in chosen]) for dataset in (rows, cache)]
    plain, without = model(**batches[0]), model.generate(**prompts[0], max_new_tokens=5)
    monkeypatch.setattr(type(model.vision_tower), "forward", lambda *_, **__: pytest.fail("the tower ran"))
    stored = model(**batches[1])
    soft, stored_soft = plain.video_outputs, stored.image_outputs
    torch.testing.assert_close(stored_soft.pooler_output, soft.pooler_output, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(stored.loss, plain.loss, atol=1e-3, rtol=1e-3)
    answers = model.generate(**prompts[1], max_new_tokens=5)[:, -5:]
    assert torch.equal(answers, without[:, -5:])
    if mode == "merge":
        assert batches[1]["token_places"].dtype == torch.float32
        torch.testing.assert_close(stored_soft.token_places, soft.token_places)
        assert stored_soft.token_places[..., 0].max() > 0.5  # seconds
    else:
        assert "token_places" not in cache[0]


def test_cached_views_are_the_frames_of_the_first_epochs(rows):
    model = merging_model()
    processor = tiny_processor(model)
    data = arguments(fps=None, num_frames=2, horizontal_flip=True, cached_views=2)
    train, _ = cache_features(model, processor, rows, None, data, seed=3)
    collator, seen = CaptionCollator(processor, data, training=True, seed=3), []
    for epoch in range(3):
        collator.epoch = epoch
        batch = collator([train[row] for row in (3, 1)])
        collator.epoch = epoch % 2
        drawn = collator([rows[row] for row in (3, 1)])
        with torch.no_grad():
            output = model.get_video_features(drawn["pixel_values_videos"], frame_times=drawn["frame_times"])
        torch.testing.assert_close(batch["vision_features"], output.last_hidden_state, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(batch["token_places"], output.token_places)
        seen.append(batch["vision_features"])
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=0.1)


def test_caching_of_videos_that_is_killed_goes_on_where_it_was(rows, tmp_path, monkeypatch):
    whole = cached(rows)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Tower(patch, fails_after=3)
        cached(rows)
    tower = Tower(monkeypatch)
    assert equal(whole, cached(rows)) and tower.images == 1
    cached(rows)
    assert tower.images == 1


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, path.stat().st_size - 1)])
def test_features_without_their_places_are_computed_again(damage, rows, tmp_path, monkeypatch):
    whole = cached(rows)
    kept = values(whole)
    damage(min((tmp_path / "hf_home" / "evlgen_features").rglob("*.safetensors")))
    tower = Tower(monkeypatch)
    again = values(cached(rows))
    assert tower.images == 1
    assert all(map(np.array_equal, sum(kept, ()), sum(again, ())))


def test_other_frames_and_modes_have_files_of_their_own(rows, monkeypatch):
    tower = Tower(monkeypatch)
    settings = [{}, {"mode": "mean"}, {"fps": 1.0}, {"fps": None, "num_frames": 2}, {"fps": None, "num_frames": 3}]
    datasets = [cached(rows, **changes) for changes in settings]
    assert tower.images == len(settings) * len(rows)
    assert all(equal(cached(rows, **changes), dataset) for changes, dataset in zip(settings, datasets, strict=True))
    assert tower.images == len(settings) * len(rows)


def test_frames_whose_files_were_replaced_are_cached_again(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for image, path in zip(noise_images(3), paths, strict=True):
        image.save(path)
    rows = Dataset.from_dict({"video": [paths], "caption": ["a cat"]})
    tower, before = Tower(monkeypatch), values(cached(rows))
    noise_images(1)[0].rotate(90).save(paths[1])
    assert not np.array_equal(before[0][0], values(cached(rows))[0][0]) and tower.images == 2


def test_a_broken_video_is_named_or_left_out(rows, caplog):
    with open(rows[1]["video"], "wb") as file:
        file.write(b"no video")
    with pytest.raises(ValueError, match="the row with the caption 'a dog'"):
        cached(rows)
    dataset = cached(rows, skip_bad_rows=True)
    assert [row["caption"] for row in dataset] == ["a cat", "a red hat", "nothing"]
    assert "1 of 4 rows are bad, by number and caption: {'1': 'a dog'}" in caplog.text


@pytest.mark.parametrize(("video", "message"), [(None, "None is no video"), ("..", "no regular"), ("x" * 300, "long")])
def test_a_row_without_a_video_is_named_or_left_out(video, message, rows):
    rows = Dataset.from_dict({**rows.to_dict(), "video": [*rows["video"][:3], video]})
    with pytest.raises(ValueError, match=f"the row with the caption 'nothing': `videos`: .*{message}"):
        cached(rows)
    assert len(cached(rows, skip_bad_rows=True)) == 3


def test_another_way_to_merge_computes_the_features_again(rows, monkeypatch):
    before = cached(rows)
    monkeypatch.setattr(video_merging, "TIME_WEIGHT", 4.0)
    assert not equal(before, cached(rows))


def test_a_wrong_video_has_the_places_of_its_own_tokens(rows):
    dataset = cached(rows)
    wrong = WrongImages(dataset, arguments())
    donor = dataset[wrong.donors[1]]
    assert all(np.array_equal(wrong[1][name], donor[name]) for name in ("vision_features", "token_places"))


@pytest.mark.parametrize("kind", ["prompts", "conversations"])
def test_cached_videos_stand_where_a_text_has_them(kind, rows):
    model = merging_model()
    processor, data = tiny_processor(model, chat=kind == "conversations"), {"prompt_column": "question"}
    if kind == "prompts":
        rows = rows.add_column("question", ["what?", "look: <video> what is it?", "<video>", "why?"])
    else:
        question = [{"type": "text", "text": "look: "}, {"type": "video"}]
        rows = rows.add_column("messages", [conversation(question, [{"type": "text", "text": "a cat"}])] * len(rows))
        processor.end_of_text, data = "<|im_end|>", {"messages_column": "messages"}
    collator = CaptionCollator(processor, arguments(**data), training=False)
    dataset = cache_split(model, rows, collator)
    for encode in (collator, collator.prompts):
        plain, stored = (encode([rows_of[row] for row in (1, 2)]) for rows_of in (rows, dataset))
        is_video = plain["input_ids"] == model.config.video_token_id
        assert torch.equal(is_video, stored["input_ids"] == model.config.image_token_id)
        assert is_video.sum() == 2 * model.config.num_image_tokens
        assert encode is not collator or torch.equal(plain["labels"], stored["labels"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None, "num_frames": 4}, "or the `num_frames` of videos needs `cached_views`: how many"),
        ({"cached_views": 2}, "`cached_views` is 2: .* goes with `cache_features` and with .* `num_frames` of videos"),
    ],
)
def test_views_are_needed_where_training_draws_frames(changes, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(arguments(dataset="videos", **changes))


def test_features_that_training_changes_are_not_cached(rows):
    model = tiny_model("eva")
    model.temporal = torch.nn.Identity()
    with pytest.raises(ValueError, match="the `temporal_contextualizer` is trained inside the vision tower"):
        cache_features(model, tiny_processor(model), rows, None, arguments(), seed=0)


@pytest.mark.parametrize("given", [["--num_frames", "8"], ["--num-frames=8"]])
def test_frames_of_the_command_line_replace_the_other_choice_of_a_file(given, tmp_path):
    (tmp_path / "recipe.yaml").write_text("fps: 2.0\n")
    data_args, *_ = parse_arguments(DataArguments, argv=["--config", str(tmp_path / "recipe.yaml"), *given])
    assert data_args.frames == {"num_frames": 8} and data_args.fps is None
