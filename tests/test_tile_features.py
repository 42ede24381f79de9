"""Cached vision features of images that are cut into tiles."""

import errno
import os
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from huggingface_hub import constants
from PIL import Image

from common.data import feature_cache
from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_features, cache_split
from common.evaluation.captions import WrongImages
from common.training.whiten import whiten_vision_projection

from .helpers import tiny_model, tiny_processor
from .test_features import Tower

SIZES = [(64, 64), (16, 16), (64, 32), (96, 32), (40, 70), (32, 64), (20, 30), (64, 64)]  # width and height
GRIDS = [[2, 2], [1, 1], [1, 2], [1, 3], [2, 2], [2, 1], [1, 1], [2, 2]]  # rows and columns
TILES = 4 + 1 + 2 + 3 + 4 + 2 + 1 + 4


@pytest.fixture(autouse=True)
def a_fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))


def images_of(sizes=SIZES):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def rows_of(sizes=SIZES):
    images = images_of(sizes)
    rows = Dataset.from_dict({"image": images, "caption": [f"caption {i}" for i in range(len(images))]})
    return rows.cast_column("image", ImageFeature(decode=False))  # as `load_datasets` leaves them


def cached(rows=None, model=None, max_tiles=4, training=False, num_views=1, **data):
    """Features, which the tower sees at most four tiles at a time."""
    model = model or tiny_model()
    processor = tiny_processor(model)
    processor.max_tiles = max_tiles
    views = CaptionCollator(processor, DataArguments(**data), training=training)
    return cache_split(model, rows_of() if rows is None else rows, views, num_views, batch_size=4)


def tiles_of(dataset):
    """The features of all tiles of the first views, a copy."""
    return np.concatenate([row["vision_features"][0].reshape(-1, 17, 16) for row in dataset])


def folder_of(tmp_path):
    return tmp_path / "hf_home" / "evlgen_features"


def test_the_cache_holds_the_features_of_all_tiles_and_the_grids():
    model = tiny_model()
    dataset = cached(model=model)
    assert [list(row["vision_features"][0].shape[:2]) for row in dataset] == GRIDS
    processor = tiny_processor(model)
    pixels = processor(images=images_of(), max_tiles=4)["pixel_values"]
    with torch.no_grad():
        expected = model.get_vision_features(pixels)
    torch.testing.assert_close(torch.tensor(tiles_of(dataset)).float(), expected, atol=1e-2, rtol=1e-2)


def test_a_batch_of_cached_tiles_is_the_batch_of_the_images():
    model, processor = tiny_model(), None
    dataset = cached(model=model)
    processor = tiny_processor(model)
    processor.max_tiles, processor.image_token_range = 4, [4, 16]
    collator = CaptionCollator(processor, DataArguments(), training=True)
    plain = rows_of()
    for chosen in ([0, 1, 2], [6, 1], [3]):
        cache = collator([dataset[row] for row in chosen])
        images = collator([plain[row] for row in chosen])
        for name in ("input_ids", "labels", "attention_mask", "image_grid_thw"):
            assert torch.equal(cache[name], images[name])  # and so the drawn number of image tokens
        with torch.no_grad():
            features = model.get_vision_features(images["pixel_values"])
        torch.testing.assert_close(cache["vision_features"], features, atol=1e-2, rtol=1e-2)


def test_views_differ_in_their_tiles():
    model = tiny_model()
    processor = tiny_processor(model)
    processor.max_tiles = 4
    data = DataArguments(crop_scale=[0.1, 1.0], horizontal_flip=True, cache_features=True, cached_views=3)
    train, test = cache_features(model, processor, rows_of(), rows_of(), data, seed=3)
    collator = CaptionCollator(processor, data, training=True, seed=3)
    plain, seen = rows_of(), []
    for epoch in range(4):
        collator.epoch = epoch
        cache = collator([train[row] for row in (0, 4, 1)])
        collator.epoch = epoch % 3
        crops = collator([plain[row] for row in (0, 4, 1)])
        assert torch.equal(cache["image_grid_thw"], crops["image_grid_thw"])
        with torch.no_grad():
            features = model.get_vision_features(crops["pixel_values"])
        torch.testing.assert_close(cache["vision_features"], features, atol=1e-2, rtol=1e-2)
        seen.append(cache["image_grid_thw"].tolist())
    assert seen[0] == seen[3] and seen[0] != seen[1]
    assert [list(row["vision_features"][0].shape[:2]) for row in test] == GRIDS


def test_one_tile_keeps_its_key_and_its_file(tmp_path):
    one = cached(max_tiles=1)
    assert one.arrays["vision_features"].shape == (len(SIZES), 1, 17, 16)
    assert one[0]["vision_features"].shape == (1, 17, 16)
        1,
        17,
        16,
    )
    (path,) = folder_of(tmp_path).glob("*.npy")
    cached(max_tiles=4)
    cached(max_tiles=2)
    assert len(list(folder_of(tmp_path).glob("*.json"))) == 3 and path.exists()


def killed(monkeypatch, after):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Tower(patch, fails_after=after)
        cached()


def test_caching_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = tiles_of(cached())
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    killed(monkeypatch, after=12)  # the first four images have ten tiles, in groups of 4, 4 and 2
    tower = Tower(monkeypatch)
    assert np.array_equal(whole, tiles_of(cached()))
    assert tower.images == TILES - 10
    cached()
    assert tower.images == TILES - 10


def test_measuring_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = tiles_of(cached())
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    cut, seen = feature_cache.cut_tiles, []

    def killed_after_three(*arguments):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(arguments)
        return cut(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feature_cache, "cut_tiles", killed_after_three)
        cached()
    calls = []
    monkeypatch.setattr(feature_cache, "cut_tiles", lambda *arguments: calls.append(1) or cut(*arguments))
    assert np.array_equal(whole, tiles_of(cached()))
    assert len(calls) == (len(SIZES) - 3) + len(SIZES)


def features_file(path):
    return next(file for file in path.glob("*.npy") if ".grids." not in file.name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(features_file(path), features_file(path).stat().st_size - 1),
        lambda path: next(path.glob("*.json")).unlink(),
        lambda path: next(path.glob("*.grids.npy")).write_bytes(b""),
        lambda path: np.save(next(path.glob("*.grids.npy")), np.full((len(SIZES), 1, 2), 3)),
        lambda path: np.save(next(path.glob("*.grids.npy")), np.full((len(SIZES), 1, 2), -1)),
        lambda path: np.save(next(path.glob("*.grids.npy")), np.zeros(3)),
    ],
)
def test_a_damaged_cache_is_computed_again(damage, tmp_path, caplog):
    whole = tiles_of(cached())
    damage(folder_of(tmp_path))
    assert np.array_equal(whole, tiles_of(cached()))
    assert "are damaged and" in caplog.text


def test_deleted_grids_are_measured_again_and_the_features_stay(tmp_path, monkeypatch):
    whole = tiles_of(cached())
    next(folder_of(tmp_path).glob("*.grids.npy")).unlink()
    tower = Tower(monkeypatch)
    assert np.array_equal(whole, tiles_of(cached()))
    assert tower.images == 0


def test_a_bad_row_has_no_tiles(caplog):
    rows = rows_of().to_list()
    rows[2]["image"] = {"bytes": b"no image", "path": None}
    rows = Dataset.from_list(rows, features=rows_of().features)
    with pytest.raises(ValueError, match="cannot be read"):
        cached(rows)
    dataset = cached(rows, skip_bad_rows=True)
    assert [list(row["vision_features"][0].shape[:2]) for row in dataset] == GRIDS[:2] + GRIDS[3:]
    assert np.array_equal(tiles_of(dataset), np.delete(tiles_of(cached()), [5, 6], axis=0))
    with pytest.raises(ValueError, match=r"1 of 8 rows are bad, by number and caption: \{'2': 'caption 2'\}"):
        cached(rows)


def test_a_full_disk_is_an_error_before_a_feature_is_computed(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        if size > 2000:  # the grids fit
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    tower = Tower(monkeypatch)
    with pytest.raises(OSError, match=r"\(in \$HF_HOME\) has no 0\.0 GB for the vision features: No space left"):
        cached()
    assert tower.images == 0


def test_an_image_that_is_replaced_meanwhile_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    images_of()[0].save(path)
    rows = Dataset.from_dict({"image": [str(path)], "caption": ["a"]})
    measure = feature_cache._measure_grids

    def measure_and_replace(*arguments):
        grids = measure(*arguments)
        images_of()[2].save(path)
        return grids

    monkeypatch.setattr(feature_cache, "_measure_grids", measure_and_replace)
    with pytest.raises(ValueError, match="The image of row 0 was replaced while its features were computed"):
        cached(rows)


def test_a_conversation_with_two_images_is_refused_by_name():
    images = images_of()
    turns = [
        {"role": "user", "content": "<image><image>"},
        {"role": "assistant", "content": "answer"},
    ]
    rows = Dataset.from_dict({"image": [images[:2]], "messages": [turns]})
    for max_tiles in (1, 4):
        with pytest.raises(ValueError, match="`cache_features` keeps one image of a row, but a row holds 2"):
            cached(rows, max_tiles=max_tiles, messages_column="messages")


def test_reading_processes_open_the_features_themselves():
    dataset = cached()
    copy = pickle.dumps(dataset)
    assert len(copy) < dataset.arrays["vision_features"].nbytes
    assert np.array_equal(pickle.loads(copy)[3]["vision_features"][0], dataset[3]["vision_features"][0])


def test_held_out_losses_with_wrong_images_take_the_tiles_of_another_row():
    dataset = cached()
    wrong = WrongImages(dataset, DataArguments())
    assert wrong[0]["vision_features"][0].shape != dataset[0]["vision_features"][0].shape or not np.array_equal(
        wrong[0]["vision_features"][0], dataset[0]["vision_features"][0]
    )


def test_whitening_measures_all_tiles_of_images_and_of_a_cache():
    projections = []
    for rows in (rows_of(), cached()):
        model = tiny_model()
        processor = tiny_processor(model)
        processor.max_tiles = 4
        whiten_vision_projection(model, processor, rows, DataArguments(), num_images=len(SIZES))
        projections.append(model.vision_projection)
    torch.testing.assert_close(projections[0].weight, projections[1].weight, atol=5e-3, rtol=2e-2)
    tokens = projections[1](model.ln_vision(torch.tensor(tiles_of(cached())).float()))
    torch.testing.assert_close(tokens.mean(dim=(0, 1)), torch.zeros(32), atol=1e-4, rtol=0)
