"""Cached vision features of images and their tiles: the images' own, whatever is killed, damaged or replaced."""

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from huggingface_hub import constants
from PIL import Image
from pretrain import whiten_vision_projection
from safetensors.numpy import save_file
from transformers import SegformerConfig, SegformerModel

from common.arguments import DataArguments
from common.data import feature_cache
from common.data.collator import CaptionCollator
from common.data.feature_cache import cache_features, cache_split
from common.data.loading import load_datasets
from modeling_evlgen.vision_tower import extract_vision_tokens

from .helpers import join, noise_images, save_split, tiny_model, tiny_processor, tiny_towers

SIZES = [(64, 64), (16, 16), (64, 32), (96, 32), (40, 70), (32, 64), (20, 30), (64, 64)]  # width and height
GRIDS = [[2, 2], [1, 1], [1, 2], [1, 3], [2, 2], [2, 1], [1, 1], [2, 2]]  # rows and columns


@pytest.fixture(autouse=True)
def a_fresh_cache(tmp_path, monkeypatch):
    """Each file holds four tiles, or one row of several tiles."""
    monkeypatch.setattr(feature_cache, "PART_TILES", 4)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))


def rows_of(sizes=SIZES):
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    rows = Dataset.from_dict({"image": images, "caption": [f"caption {i}" for i in range(len(images))]})
    return rows.cast_column("image", ImageFeature(decode=False))  # as `load_datasets` leaves them


def processor_for(model, max_tiles=4):
    processor = tiny_processor(model)
    processor.max_tiles = max_tiles
    return processor


def cached(rows=None, model=None, max_tiles=1, **data):
    model = model or tiny_model()
    views = CaptionCollator(processor_for(model, max_tiles), DataArguments(**data), training=False)
    return cache_split(model, rows_of() if rows is None else rows, views)


def values(dataset):
    """The features of all tiles of the first views, a copy: files are cut off below."""
    return np.concatenate([row["vision_features"][0].reshape(-1, 17, 16) for row in dataset])


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


@pytest.mark.parametrize(("max_tiles", "before", "after"), [(1, 4, 4), (4, 10, 11)])
def test_caching_that_is_killed_goes_on_where_it_was(max_tiles, before, after, tmp_path, monkeypatch):
    whole = values(cached(max_tiles=max_tiles))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "another"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Tower(patch, fails_after=before)
        cached(max_tiles=max_tiles)
    for _ in range(2):
        tower = Tower(monkeypatch)
        assert np.array_equal(whole, values(cached(max_tiles=max_tiles)))
        assert tower.images == after
        after = 0


def test_a_feature_map_that_lies_channel_by_channel_is_cached_token_by_token():
    sizes = {"hidden_sizes": [4, 8, 8, 16], "depths": [1] * 4, "sr_ratios": [1] * 4, "num_attention_heads": [1] * 4}
    model = join(SegformerModel(SegformerConfig(**sizes, image_size=64)).eval(), tiny_towers()[1], image_size=64)
    views, rows = CaptionCollator(tiny_processor(model), DataArguments(), training=False), rows_of()
    views.processor.image_processor.size = {"height": 64, "width": 64}
    batches = [views([row])["pixel_values"] for row in rows]
    with torch.no_grad():
        features = extract_vision_tokens(model.vision_tower, batches[0])
        expected = [model.get_vision_features(pixels)[0] for pixels in batches]
    assert features.shape == (1, 4, 16) and not features.is_contiguous()
    for row, wanted in zip(cache_split(model, rows, views), expected, strict=True):
        torch.testing.assert_close(torch.tensor(row["vision_features"][0]).float(), wanted, atol=1e-2, rtol=1e-2)


def test_two_runs_that_want_the_same_features_compute_them_once(monkeypatch):
    tower = Tower(monkeypatch)
    with ThreadPoolExecutor(2) as runs:
        one, other = runs.map(lambda model: values(cached(model=model)), [tiny_model(), tiny_model()])
    assert tower.images == len(SIZES) and np.array_equal(one, other)


@pytest.mark.parametrize("max_tiles", [1, 4])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 4),
        lambda path: path.write_text('{"grids": 10'),
        lambda path: save_file({"grids": np.zeros(3)}, path),
        lambda path: save_file({"vision_features": np.zeros(3)}, path, {"bad_rows": "{}"}),
    ],
)
def test_a_damaged_part_of_a_cache_is_computed_again(max_tiles, damage, tmp_path, monkeypatch, caplog):
    whole = values(cached(max_tiles=max_tiles))
    damage(min((tmp_path / "hf_home" / "evlgen_features").rglob("*.safetensors")))
    tower = Tower(monkeypatch)
    assert np.array_equal(whole, values(cached(max_tiles=max_tiles)))
    assert tower.images == 4 and "are damaged and computed again" in caplog.text


def from_folder(paths):
    return load_datasets(DataArguments(dataset=str(paths[0].parents[1]), test_split=""), seed=0)[0]


def in_column(wrap, feature=None):
    def rows_of_paths(paths):
        rows = Dataset.from_dict({"image": [wrap(str(path)) for path in paths], "caption": ["a", "b"]})
        return rows if feature is None else rows.cast_column("image", feature)

    return rows_of_paths


UNREAD = ImageFeature(decode=False)


@pytest.mark.attack
@pytest.mark.parametrize(
    "load",
    [
        in_column(lambda path: path),
        in_column(lambda path: [path]),
        in_column(lambda path: {"bytes": None, "path": path}),
        in_column(lambda path: {"bytes": None, "path": path}, UNREAD),
        in_column(lambda path: [{"bytes": None, "path": path}], List(UNREAD)),
        lambda paths: in_column(lambda path: {"bytes": None, "path": path}, UNREAD)(paths).select([1, 0]),
        from_folder,
    ],
    ids=["path", "paths", "dict", "image", "images", "chosen", "folder"],
)
def test_other_images_of_the_same_names_are_not_taken_from_the_cache(load, tmp_path, monkeypatch):
    """Their times may be the old ones, as after a copy."""
    save_split(tmp_path / "images" / "train", noise_images(2), [{"caption": "a"}, {"caption": "b"}])
    paths = [tmp_path / "images" / "train" / name for name in ("0.png", "1.png")]
    before, old = values(cached(load(paths))), paths[1].stat()
    tower = Tower(monkeypatch)
    assert np.array_equal(before, values(cached(load(paths)))) and tower.images == 0
    noise_images(2, size=50)[0].save(paths[1])
    os.utime(paths[1], ns=(old.st_atime_ns, old.st_mtime_ns))
    assert not np.allclose(before, values(cached(load(paths))))


@pytest.mark.parametrize(("max_tiles", "free", "images"), [(1, 1000, 0), (4, 17 * 16 * 2 * 8, 4)])
def test_a_full_disk_is_told_as_soon_as_it_is_known(max_tiles, free, images, monkeypatch):
    """Of several tiles, after the first part: its rows have more than one tile each."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    tower = Tower(monkeypatch)
    with pytest.raises(OSError, match=r"vision features needs .* only 0\.00 GB are free: .*evlgen_features"):
        cached(max_tiles=max_tiles)
    assert tower.images == images


@pytest.mark.parametrize("max_tiles", [1, 4])
def test_reading_processes_open_the_features_themselves(max_tiles):
    """They may be started anew, as on a Mac, and the features are more than memory holds."""
    rows = cached(max_tiles=max_tiles)
    copy = pickle.dumps(rows)
    assert len(copy) < values(rows).nbytes
    assert np.array_equal(values(pickle.loads(copy)), values(rows))


@pytest.mark.parametrize("max_tiles", [1, 4])
def test_cached_views_are_the_crops_of_the_first_epochs(max_tiles):
    model, rows = tiny_model(), rows_of()
    processor = processor_for(model, max_tiles)
    data = DataArguments(crop_scale=[0.1, 1.0], horizontal_flip=True, cache_features=True, cached_views=3)
    train, test = cache_features(model, processor, rows, rows, data, seed=3)
    collator, seen = CaptionCollator(processor, data, training=True, seed=3), []
    for epoch in range(4):
        collator.epoch = epoch
        cache = collator([train[row] for row in (0, 4, 1)])
        collator.epoch = epoch % 3
        crops = collator([rows[row] for row in (0, 4, 1)])
        assert max_tiles == 1 or torch.equal(cache["image_grid_thw"], crops["image_grid_thw"])
        with torch.no_grad():
            features = model.get_vision_features(crops["pixel_values"])
        torch.testing.assert_close(cache["vision_features"], features, atol=1e-2, rtol=1e-2)
        seen.append(cache["vision_features"])
    assert torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], seen[1])
    plain = CaptionCollator(processor, data, training=False)
    with torch.no_grad():
        whole = model.get_vision_features(plain([rows[0]])["pixel_values"])
    torch.testing.assert_close(plain([test[0]])["vision_features"], whole, atol=1e-2, rtol=1e-2)


def test_a_batch_of_cached_tiles_is_the_batch_of_the_images():
    model, plain = tiny_model(), rows_of()
    dataset = cached(model=model, max_tiles=4)
    assert [list(row["vision_features"][0].shape[:2]) for row in dataset] == GRIDS
    processor = processor_for(model)
    processor.image_token_range = [4, 16]
    collator = CaptionCollator(processor, DataArguments(), training=True)
    for chosen in ([0, 1, 2], [6, 1], [3]):
        cache, images = (collator([rows[row] for row in chosen]) for rows in (dataset, plain))
        for name in ("input_ids", "labels", "attention_mask", "image_grid_thw"):
            assert torch.equal(cache[name], images[name])  # and so the drawn number of image tokens
        with torch.no_grad():
            features = model.get_vision_features(images["pixel_values"])
        torch.testing.assert_close(cache["vision_features"], features, atol=1e-2, rtol=1e-2)


def test_a_bad_row_has_no_tiles():
    rows = rows_of().to_list()
    rows[2]["image"] = {"bytes": b"no image", "path": None}
    rows = Dataset.from_list(rows, features=rows_of().features)
    with pytest.raises(ValueError, match="cannot be read"):
        cached(rows, max_tiles=4)
    dataset = cached(rows, max_tiles=4, skip_bad_rows=True)
    assert [list(row["vision_features"][0].shape[:2]) for row in dataset] == GRIDS[:2] + GRIDS[3:]
    assert np.array_equal(values(dataset), np.delete(values(cached(max_tiles=4)), [5, 6], axis=0))
    with pytest.raises(ValueError, match=r"1 of 8 rows .*'2': 'caption 2'"):
        cached(rows, max_tiles=4)


def test_a_conversation_with_two_images_is_refused_by_name():
    turns = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "answer"}]
    rows = Dataset.from_dict({"image": [noise_images(2)], "messages": [turns]})
    with pytest.raises(ValueError, match=r"`cache_features` .* holds 2"):
        cached(rows, messages_column="messages")


def test_whitening_measures_all_tiles_of_images_and_of_a_cache():
    projections = []
    for rows in (rows_of(), cached(max_tiles=4)):
        model = tiny_model()
        processor = tiny_processor(model)
        processor.max_tiles = 4
        whiten_vision_projection(model, processor, rows, DataArguments(), num_images=len(SIZES))
        projections.append(model.vision_projection)
    torch.testing.assert_close(projections[0].weight, projections[1].weight, atol=5e-3, rtol=2e-2)
    tokens = projections[1](model.ln_vision(torch.tensor(values(cached(max_tiles=4))).float()))
    torch.testing.assert_close(tokens.mean(dim=(0, 1)), torch.zeros(32), atol=1e-4, rtol=0)


def test_the_batch_norms_of_a_cnn_are_folded_for_its_features_alone():
    torch.manual_seed(0)
    model = tiny_model("timm_cnn")
    tower = model.vision_tower
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = feature_cache.fold_batch_norms(tower)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    pixels = torch.randn(2, 3, 64, 64)
    wanted, found = (extract_vision_tokens(net, pixels) for net in (tower, folded))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    cached(model=model)
    assert model.vision_tower is tower
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    # A norm that stands before its convolution is not what it seems from the order of the modules.
    odd = tiny_model("timm_cnn").vision_tower
    norm = next(module for module in odd.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, inputs, output: output + 1)
    assert feature_cache.fold_batch_norms(odd) is odd
    vit = tiny_model().vision_tower
    assert feature_cache.fold_batch_norms(vit) is vit
