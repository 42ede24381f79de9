"""Cached vision features: the images' own, whatever is killed, damaged, deleted, replaced or full meanwhile."""

import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from huggingface_hub import constants

from common.data import feature_cache
from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_features, cache_split

from .helpers import noise_images, tiny_model, tiny_processor


@pytest.fixture(autouse=True)
def a_fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))


def cached(rows=10, model=None):
    """Features of a few images, which the tower sees four at a time."""
    model = model or tiny_model()
    if isinstance(rows, int):
        rows = Dataset.from_dict({"image": noise_images(rows), "caption": ["a"] * rows})
    return cache_split(
        model, rows, CaptionCollator(tiny_processor(model), DataArguments(), training=False), batch_size=4
    )


def values(dataset):
    return np.stack([row["vision_features"] for row in dataset])  # a copy: files are cut off below


class Tower:
    """Counts the images that the vision tower sees, and fails after some."""

    def __init__(self, monkeypatch, fails_after=None):
        self.run, self.images, self.fails_after = feature_cache._run_tower, 0, fails_after
        monkeypatch.setattr(feature_cache, "_run_tower", self)

    def __call__(self, model, processor, images):
        if self.fails_after is not None and self.images >= self.fails_after:
            raise KeyboardInterrupt
        self.images += len(images)
        return self.run(model, processor, images)


def test_caching_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = values(cached())
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Tower(patch, fails_after=8)
        cached()
    tower = Tower(monkeypatch)
    resumed = values(cached())
    assert tower.images == 2 and np.array_equal(whole, resumed)
    cached()
    assert tower.images == 2


def test_two_runs_that_want_the_same_features_compute_them_once(monkeypatch):
    tower = Tower(monkeypatch)
    with ThreadPoolExecutor(2) as runs:
        one, other = runs.map(lambda model: values(cached(model=model)), [tiny_model(), tiny_model()])
    assert tower.images == 10 and np.array_equal(one, other)


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("json", lambda path: path.unlink()),
        ("npy", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("npy", lambda path: path.write_bytes(b"")),
        ("npy", lambda path: path.write_bytes(b"PK" + bytes(path.stat().st_size))),
        ("npy", lambda path: np.save(path, np.zeros(3))),
        ("json", lambda path: path.write_text('{"done": 10')),
        ("json", lambda path: path.write_text('{"done": 4, "bad_rows": []}')),
    ],
)
def test_a_damaged_cache_is_computed_again(suffix, damage, tmp_path, monkeypatch, caplog):
    whole = values(cached())
    damage(*(tmp_path / "hf_home" / "evlgen_features").glob(f"*.{suffix}"))
    tower = Tower(monkeypatch)
    assert np.array_equal(whole, values(cached()))
    assert tower.images == 10 and "are damaged and computed again" in caplog.text


def test_a_deleted_cache_is_computed_again(tmp_path):
    whole = values(cached())
    next((tmp_path / "hf_home" / "evlgen_features").glob("*.npy")).unlink()
    assert np.array_equal(whole, values(cached()))


def test_a_damaged_part_of_a_cache_is_not_gone_on_with(tmp_path, monkeypatch):
    """Where the file is too short, zeros would stand for features that are said to be there."""
    whole = values(cached())
    folder = tmp_path / "hf_home" / "evlgen_features"
    (path,) = folder.glob("*.npy")
    os.truncate(path, path.stat().st_size // 2)
    path.rename(path.with_suffix(".partial.npy"))
    assert np.array_equal(whole, values(cached()))


def test_other_images_of_the_same_names_are_not_taken_from_the_cache(tmp_path):
    path = tmp_path / "a.png"
    rows = Dataset.from_dict({"image": [str(path)], "caption": ["a"]})
    first, second = noise_images(2)
    first.save(path)
    before = values(cached(rows))
    second.save(path)
    assert not np.allclose(before, values(cached(rows)))


def test_a_full_disk_is_told_before_a_feature_is_computed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    tower = Tower(monkeypatch)
    with pytest.raises(OSError, match=r"\(in \$HF_HOME\) has no 0\.0 GB for the vision features: No space left"):
        cached()
    assert tower.images == 0 and not list((tmp_path / "hf_home" / "evlgen_features").glob("*.npy"))


def test_reading_processes_open_the_features_themselves():
    """They may be started anew, as on a Mac, and the features are more than memory holds."""
    rows = cached()
    copy = pickle.dumps(rows)
    assert len(copy) < rows.arrays["vision_features"].nbytes
    assert np.array_equal(pickle.loads(copy)[3]["vision_features"], rows[3]["vision_features"])


def test_cached_views_are_the_crops_of_the_first_epochs():
    model = tiny_model()
    processor = tiny_processor(model)
    rows = Dataset.from_dict({"image": noise_images(4), "caption": ["a", "b", "c", "d"]})
    rows = rows.cast_column("image", ImageFeature(decode=False))  # as `load_datasets` leaves them
    data = DataArguments(crop_scale=[0.2, 0.6], horizontal_flip=True, cache_features=True, cached_views=2)
    train, test = cache_features(model, processor, rows, rows, data, seed=3)
    collator = CaptionCollator(processor, data, training=True, seed=3)
    seen = []
    for epoch in (0, 1, 2):
        collator.epoch = epoch
        cached = collator([train[row] for row in (2, 0)])["vision_features"]
        collator.epoch = epoch % 2
        crops = collator([rows[row] for row in (2, 0)])["pixel_values"]
        with torch.no_grad():
            torch.testing.assert_close(cached, model.get_vision_features(crops), atol=1e-2, rtol=1e-2)
        seen.append(cached)
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=0.1)
    plain = CaptionCollator(processor, data, training=False)
    whole = model.get_vision_features(plain([rows[1]])["pixel_values"])
    torch.testing.assert_close(plain([test[1]])["vision_features"], whole, atol=1e-2, rtol=1e-2)
