"""Features of a frozen vision tower, computed once and read from disk in every epoch.

`Dataset.map` would start again at the first row after a kill, and would write float16 arrays as lists of Arrow, which
are slow to read. So each few rows, a part, have a safetensors file of their own, which appears when it is whole.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import constants
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from common.arguments import DataArguments
from common.data.collator import CaptionCollator
from common.data.rows import start_of_text
from common.files import file_state, media_paths, replacing
from modeling_evlgen import EVLGenForConditionalGeneration, video_merging
from modeling_evlgen.checkpoints import check_disk_space
from modeling_evlgen.fingerprints import hash_weights
from modeling_evlgen.vision_tower import extract_vision_tokens, find_image_size
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import MAX_PIXELS, cut_tiles, flatten_images, tile_size
from processing_evlgen.videos import VideoFrames

logger = logging.get_logger(__name__)

PART_TILES, PART_VIDEOS = 256, 32  # at most, in one part: about as much work as a kill may undo
Part = tuple[np.ndarray, dict[str, str]]  # grids, int64, (rows, views, 2), and texts of bad rows by row


class FeatureDataset(torch.utils.data.Dataset):
    """Good rows of a data set, with `vision_features` from files in place of the image or video.

    They are a list with an entry for each view, of shape (tokens, dim), or (rows of tiles, columns of tiles, tokens,
    dim) if `is_tiled`. Merged videos have `token_places` as well, of shape (tokens, 3) each. `images` are all rows,
    and `parts` are those of the files in `folder`, in order.
    """

    def __init__(self, images: Dataset, media_column: str, folder: Path, parts: list[Part], is_tiled: bool):
        bad = {int(row) for _, bad_rows in parts for row in bad_rows}
        self.rows = [row for row in range(len(images)) if row not in bad]
        self.images = images if len(self.rows) == len(images) else images.select(self.rows)
        self.texts = self.images.remove_columns(media_column)
        self.folder, self.is_tiled = folder, is_tiled
        grids = [grids for grids, _ in parts]  # (rows, views, 2) each
        self.part_rows = len(grids[0]) if grids else 1
        counts = [grid.prod(axis=2) for grid in grids]
        self.grids = np.concatenate(grids) if grids else np.empty((0, 1, 2), dtype=int)
        # Of each view, the position of its first tile in its part, (rows, views).
        starts = [count.cumsum().reshape(count.shape) - count for count in counts]
        self.starts = np.concatenate(starts) if starts else np.empty((0, 1), dtype=int)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, found = self.rows[index], dict(self.texts[index])
        with safe_open(_path(self.folder, row // self.part_rows), "numpy") as file:
            for name in set(file.keys()) - {"grids"}:
                values = file.get_slice(name)  # not read from disk yet
                found[name] = []
                for start, grid in zip(self.starts[row].tolist(), self.grids[row].tolist(), strict=True):
                    tiles = values[start : start + math.prod(grid)]
                    found[name].append(tiles.reshape(*(grid if self.is_tiled else ()), *tiles.shape[1:]))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "images": None}  # a reading process needs no images


def cache_features(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    train: Any,
    test: Dataset | None,
    data_args: DataArguments,
    seed: int,
) -> tuple[Any, Any]:
    """Runs the vision tower over both splits; over `cached_views` crops, flips and choices of frames in training.

    The views are those that the first epochs would draw without a cache. Without `cache_features` the splits are
    returned as they are. Raises a ValueError if the model has a temporal contextualizer.
    """
    if not data_args.cache_features:
        return train, test
    if model.temporal is not None:
        raise ValueError("`cache_features`: the `temporal_contextualizer` is trained inside the vision tower.")
    views = CaptionCollator(processor, data_args, training=True, seed=seed)
    train = cache_split(model, train, views, data_args.cached_views or 1)
    if test is None:
        return train, None
    return train, cache_split(model, test, CaptionCollator(processor, data_args, training=False))


def cache_split(
    model: EVLGenForConditionalGeneration, dataset: Dataset, views: CaptionCollator, num_views: int = 1
) -> FeatureDataset:
    """Runs the vision tower over a split, or finds its features on disk.

    The features lie in `$HF_HOME/evlgen_features`. Each tower (weights included), image processor, augmentation, data
    set, `max_pixels` and `max_tiles` has a folder of its own, and for videos each choice of frames and `video_mode`. A
    run that was killed goes on where it stopped. A damaged file is computed again. `views` opens an image or a video,
    and gives another view of it in each `epoch`. Raises a ValueError if a row is bad and not to be skipped, or a
    feature does not fit float16. Raises an OSError if the disk has no room for the features.
    """
    data_args, config = views.data_args, model.config
    is_video = data_args.video_column is not None
    max_tiles = 1 if is_video else views.processor.max_tiles
    part_rows = max(1, (PART_VIDEOS if is_video else PART_TILES) // (num_views * max_tiles))
    # The activations of four images stay in a processor's cache. Batches of 32 took the demo's CNN twice as long.
    # The frames of many videos would fill memory.
    batch_size = 1 if is_video else 4 if model.device.type == "cpu" else 32
    tile_bytes = config.num_vision_tokens * (2 * config.vision_hidden_size + 12 * (config.video_mode == "merge"))

    folder = Path(constants.HF_HOME) / "evlgen_features" / _key(model, dataset, views, num_views)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # another run may compute the same features
        ranges = [range(row, min(row + part_rows, len(dataset))) for row in range(0, len(dataset), part_rows)]
        parts = [_read_part(_path(folder, number)) for number in range(len(ranges))]
        left = sum(len(rows) for rows, part in zip(ranges, parts, strict=True) if part is None)
        done = num_tiles = 0
        with tqdm(total=left, desc="Vision features", unit="row", disable=not left) as progress, folded_tower(model):
            for number in [number for number, part in enumerate(parts) if part is None]:
                # At first each view counts as one tile, then as many as the views before it had.
                tiles_of_row = num_tiles / done if done else num_views
                check_disk_space(folder, (left - done) * tiles_of_row * tile_bytes, "The cache of vision features")
                parts[number], tiles = _compute_part(model, dataset, ranges[number], views, num_views, batch_size)
                with replacing(_path(folder, number)) as path:
                    grids, bad_rows = parts[number]
                    save_file({"grids": grids, **tiles}, path, {"bad_rows": json.dumps(bad_rows)})
                num_tiles += int(grids.prod(axis=2).sum())
                done += len(ranges[number])
                progress.update(len(ranges[number]))
    bad_rows = {row: text for _, texts in parts for row, text in texts.items()}
    if bad_rows:
        message = f"{len(bad_rows)} of {len(dataset)} rows are bad, by number and caption: {bad_rows}"
        if not data_args.skip_bad_rows:
            raise ValueError(f"{message} (`--skip_bad_rows true` goes on without them.)")
        logger.warning(f"Left out: {message}.")
    column = data_args.video_column or data_args.image_column
    return FeatureDataset(dataset, column, folder, parts, is_tiled=max_tiles > 1)


@contextmanager
def folded_tower(model: EVLGenForConditionalGeneration) -> Iterator[None]:
    """While open, the batch norms of a CNN are inside its convolutions, in a copy of the tower."""
    tower = model.vision_tower
    model.vision_tower = fold_batch_norms(tower)
    try:
        yield
    finally:
        model.vision_tower = tower


@torch.no_grad()
def fold_batch_norms(tower: PreTrainedModel) -> PreTrainedModel:
    """A copy of a CNN without batch norms, for inference alone. It is equal up to rounding.

    Other towers are returned as they are. So is one whose batch norms do not follow the convolutions before them.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in tower.modules()):
        return tower
    folded, conv_name = copy.deepcopy(tower), None
    for name, module in list(folded.named_modules()):
        if isinstance(module, nn.Conv2d):
            conv_name = name
        elif isinstance(module, nn.BatchNorm2d) and conv_name is not None:
            conv = folded.get_submodule(conv_name)
            if conv.out_channels != module.num_features:
                return tower
            folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, module))
            folded.set_submodule(name, nn.Sequential(*module.children()))  # timm's have an activation inside
            conv_name = None
    pixels = torch.linspace(-1, 1, 3 * math.prod(size := find_image_size(tower.config))).view(1, 3, *size).sin()
    pixels = pixels.to(tower.device, tower.dtype)
    wanted, found = (extract_vision_tokens(net, pixels) for net in (tower, folded))
    return folded if (found - wanted).abs().max() < 1e-3 * wanted.abs().max() else tower


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def _read_part(path: Path) -> Part | None:
    """What a part's file says of its rows. None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            return file.get_tensor("grids"), json.loads(file.metadata()["bad_rows"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning(f"The cached vision features in {path} are damaged and computed again: {error}")
        return None


def _compute_part(
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    rows: range,
    views: CaptionCollator,
    num_views: int,
    batch_size: int,
) -> tuple[Part, dict[str, np.ndarray]]:
    """What [`_read_part`] returns, and the arrays of all tiles by their names."""
    grids, bad_rows = np.zeros((len(rows), num_views, 2), np.int64), {}

    def cut_all() -> Iterator[Image.Image | VideoFrames]:
        for place, number in enumerate(rows):
            row = dataset[number]
            for view in range(num_views):
                tiles, grids[place, view] = _read_tiles(row, views, view)
                if not tiles:
                    bad_rows[str(number)] = start_of_text(row, views.data_args)
                    break
                yield from tiles

    tiles = cut_all()
    batches = iter(lambda: list(islice(tiles, batch_size)), [])
    computed = [_run_tower(model, views.processor, batch) for batch in batches]
    names = computed[0] if computed else ()
    return (grids, bad_rows), {name: np.concatenate([batch[name] for batch in computed]) for name in names}


def _read_tiles(row: dict[str, Any], views: CaptionCollator, view: int) -> tuple[list[Any], tuple[int, int]]:
    """The tiles of one view of a row's image, and their grid. A video is one tile; a bad row has none."""
    views.epoch, processor = view, views.processor
    media = views.read(row)
    if isinstance(media, VideoFrames):
        return [media], (1, 1)
    images = [] if media is None else flatten_images(media)  # of a conversation, a list
    if len(images) > 1:
        raise ValueError(f"`cache_features` keeps one image of a row, but a row holds {len(images)}.")
    if not images or processor.max_tiles == 1:
        return images, (len(images), len(images))
    return cut_tiles(images[0], tile_size(processor.image_processor), processor.max_tiles)


@torch.no_grad()
def _run_tower(
    model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, media: list[Image.Image] | list[VideoFrames]
) -> dict[str, np.ndarray]:
    """Features, float16, `(media, tokens, dim)`; of merged videos also places, float32, `(videos, tokens, 3)`."""
    device = model.vision_tower.device
    if isinstance(media[0], VideoFrames):
        inputs = processor(videos=media, do_sample_frames=False).to(device)
        pixels = inputs["pixel_values_videos"], inputs.get("frame_mask"), inputs["frame_times"]
    else:
        pixels = processor.image_processor(media, return_tensors="pt")["pixel_values"].to(device), None, None
    features, places = model._run_tower(*pixels)
    features = features.half().cpu()
    if not features.isfinite().all():
        raise ValueError("The vision tower's features do not fit float16, so they cannot be cached.")
    found = {"vision_features": features.numpy()}
    return found if places is None else {**found, "token_places": places.cpu().numpy()}


def _key(model: EVLGenForConditionalGeneration, dataset: Dataset, views: CaptionCollator, num_views: int) -> str:
    """Identifies the features by everything that they depend on."""
    data_args = views.data_args
    draws = views.training and data_args.draws_views
    augmentation = (views.seed, data_args.crop_scale, data_args.horizontal_flip) if draws else ()
    digest = hashlib.sha256(repr((num_views, PART_TILES, PART_VIDEOS, *augmentation)).encode())
    digest.update(views.processor.image_processor.to_json_string().encode())
    digest.update(model.config.vision_config.to_json_string().encode())
    digest.update(hash_weights(model.vision_tower.state_dict()).encode())
    digest.update(dataset._fingerprint.encode())  # private, but only `datasets` knows what its cache files hold
    if data_args.video_column:
        mode, class_token = model.config.video_mode, model.config.connector_config.class_token
        merging = mode == "merge" and (class_token, video_merging.ROUNDS, video_merging.TIME_WEIGHT)
        # The 2 is a version. It rises when the same choice reads other frames of a file.
        digest.update(repr(("video", 2, data_args.frames, mode, merging)).encode())
        settings = views.processor.video_processor.to_dict()
        settings = {name: value for name, value in settings.items() if name not in ("num_frames", "fps")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    elif views.processor.max_tiles > 1:
        digest.update(f"max_tiles {views.processor.max_tiles}".encode())
    if data_args.max_pixels != MAX_PIXELS:  # it decides which rows are bad
        digest.update(f"max_pixels {data_args.max_pixels}".encode())
    # The fingerprint does not cover the files behind paths.
    for path in media_paths(dataset, data_args.video_column or data_args.image_column):
        if state := file_state(path):
            digest.update(f"{path} {state[0]} {state[1]}".encode())
    return digest.hexdigest()[:32]
