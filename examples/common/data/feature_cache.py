"""Features of a frozen vision tower, computed once and read from disk in every epoch.

`Dataset.map` would start again at the first row after a kill, and would write float16 arrays as lists of Arrow, which
are slow to read. So the features of all rows lie in one NumPy file, with the number of finished rows beside it. With a
`processor.max_tiles` above 1, images differ in their number of tiles. Then the grids of all images are measured first,
into a small NumPy file, and the features of all tiles follow each other. Merged videos have a second file, with the
places of their tokens.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from filelock import FileLock
from huggingface_hub import constants
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.rows import start_of_text
from common.files import write_whole
from modeling_evlgen import EVLGenForConditionalGeneration, video_merging
from modeling_evlgen.fingerprints import hash_weights
from processing_evlgen import EVLGenProcessor
from processing_evlgen.cut_tiles import cut_tiles, tile_size
from processing_evlgen.images import MAX_PIXELS
from processing_evlgen.inputs import flatten_images
from processing_evlgen.videos import VideoFrames

logger = logging.get_logger(__name__)


SUFFIXES = {"vision_features": ".npy", "token_places": ".places.npy"}


class FeatureFiles:
    """The NumPy files of a split's features, and the JSON file with what is done of them.

    Args:
        stem (`Path`): Their common path, without a suffix.
        num_rows (`int`): Rows of the split.
        shape (`tuple[int, ...]`): That of the features: `(rows, views, tokens, dim)` or `(tiles, tokens, dim)`.
        has_places (`bool`): Whether the places of the tokens are kept as well, `(rows, views, tokens, 3)`.
    """

    def __init__(self, stem: Path, num_rows: int, shape: tuple[int, ...], has_places: bool):
        self.stem = stem
        self.num_rows = num_rows
        self.arrays: dict[str, tuple[type, tuple[int, ...]]] = {"vision_features": (np.float16, shape)}
        if has_places:
            self.arrays["token_places"] = (np.float32, (*shape[:-1], 3))

    def path(self, name: str, partial: bool = False) -> Path:
        return self.stem.with_name(f"{self.stem.name}{'.partial' if partial else ''}{SUFFIXES[name]}")

    def open(self, partial: bool = False) -> dict[str, np.memmap]:
        """Opens the files to read. A pickle or an archive is refused."""
        return {name: np.lib.format.open_memmap(self.path(name, partial), mode="r") for name in self.arrays}

    def read_state(self, partial: bool = False) -> dict[str, Any] | None:
        """The number of finished rows and the captions of bad rows; None if a file is missing, or damaged (logged).

        Shapes are checked, since a file that is too short would be filled with zeros when it is opened for writing.
        """
        path = self.path("vision_features", partial)
        if not path.exists():
            return None
        try:
            state = json.loads(self.stem.with_suffix(".json").read_text(encoding="utf-8"))
            for name, array in self.open(partial).items():
                if (array.dtype, array.shape) != self.arrays[name]:
                    raise ValueError(f"`{name}` are {array.dtype} {array.shape}, not {self.arrays[name]}")
            if 0 <= state["done"] <= self.num_rows and isinstance(state["bad_rows"], dict):
                return state
            raise ValueError(f"its state is {state}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(f"The cached vision features in {path} are damaged and computed again: {error}")
            return None

    def write_state(self, state: dict[str, Any]) -> None:
        write_whole(self.stem.with_suffix(".json"), json.dumps(state))

    def open_to_write(self, anew: bool) -> list[np.memmap]:
        """Opens the partial files, or creates them. Raises an OSError if the disk has no room for them."""
        opened = []
        for name, (dtype, shape) in self.arrays.items():
            path = self.path(name, partial=True)
            opened.append(np.lib.format.open_memmap(path, "w+" if anew else "r+", dtype, shape))
            _reserve_disk_space(path, opened[-1])
        return opened

    def complete(self) -> None:
        """Gives the partial files their final names, the features last, since they show that all is there."""
        for name in reversed(self.arrays):
            os.replace(self.path(name, partial=True), self.path(name))


class FeatureDataset(torch.utils.data.Dataset):
    """Good rows of a data set, with `vision_features` from a file in place of the image or video.

    They have shape (views, tokens, dim). With `grids`, they are a list with an entry for each view, of shape
    (rows of tiles, columns of tiles, tokens, dim). Merged videos have `token_places` as well, (views, tokens, 3).
    """

    def __init__(
        self, images: Dataset, files: FeatureFiles, rows: list[int], media_column: str, grids: np.ndarray | None
    ):
        self.images = images if len(rows) == len(images) else images.select(rows)
        self.texts = self.images.remove_columns(media_column)
        self.files = files
        self.arrays = files.open()
        self.rows = rows
        self.grids = grids  # (rows, views, 2)
        self.starts = None if grids is None else _first_tiles(grids)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if self.grids is None:
            return self.texts[index] | {name: array[row] for name, array in self.arrays.items()}  # not read yet
        features = self.arrays["vision_features"]
        views = [
            features[start : start + grid.prod()].reshape(*grid, *features.shape[1:])
            for start, grid in zip(self.starts[row], self.grids[row], strict=True)
        ]
        return {**self.texts[index], "vision_features": views}

    def __getstate__(self) -> dict[str, Any]:
        # A worker gets a pickled copy. It opens the files itself, and needs no images.
        return {**vars(self), "arrays": None, "images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, arrays=state["files"].open())


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
    returned as they are.

    Raises:
        ValueError: If the model has a temporal contextualizer.
    """
    if not data_args.cache_features:
        return train, test
    if model.temporal is not None:
        raise ValueError(
            "`cache_features` needs features that training does not change, but the `temporal_contextualizer` is "
            "trained inside the vision tower."
        )
    views = CaptionCollator(processor, data_args, training=True, seed=seed)
    train = cache_split(model, train, views, data_args.cached_views or 1)
    if test is None:
        return train, None
    return train, cache_split(model, test, CaptionCollator(processor, data_args, training=False))


def cache_split(
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    views: CaptionCollator,
    num_views: int = 1,
    batch_size: int = 32,
) -> FeatureDataset:
    """Runs the vision tower over a split, or finds its features on disk.

    The features lie in `$HF_HOME/evlgen_features`. Each tower (weights included), image processor, augmentation, data
    set, `max_pixels` and `max_tiles` has a file of its own, and for videos each choice of frames and `video_mode`. A
    run that was killed goes on where it stopped. A damaged file is computed again. `views` opens an image or a video,
    and gives another view of it in each `epoch`.

    Raises:
        ValueError: If a row is bad and not to be skipped, or a feature does not fit float16.
        OSError: If the disk has no room for the features.
    """
    folder = Path(constants.HF_HOME) / "evlgen_features"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / _key(model, dataset, views, num_views)
    sizes = (model.config.num_vision_tokens, model.config.vision_hidden_size)
    is_video = views.data_args.video_column is not None
    batch_size = 1 if is_video else batch_size  # the frames of many videos would fill memory
    with FileLock(stem.with_suffix(".lock")):  # another run may compute the same features
        grids, shape = None, (len(dataset), num_views, *sizes)
        if views.processor.max_tiles > 1 and not is_video:
            grids = _measure_grids(stem.with_suffix(".grids.npy"), dataset, views, num_views)
            shape = (int(grids.prod(axis=2).sum()), *sizes)
        files = FeatureFiles(stem, len(dataset), shape, is_video and model.config.video_mode == "merge")
        state = files.read_state()
        if state is None or state["done"] < len(dataset):
            all_grids = np.ones((len(dataset), num_views, 2), np.int64) if grids is None else grids
            state = _compute(files, all_grids, model, dataset, views, batch_size)
        good = [row for row in range(len(dataset)) if str(row) not in state["bad_rows"]]
        column = views.data_args.video_column or views.data_args.image_column
        features = FeatureDataset(dataset, files, good, column, grids)
    if bad_rows := state["bad_rows"]:
        message = f"{len(bad_rows)} of {len(dataset)} rows are bad, by number and caption: {bad_rows}"
        if not views.data_args.skip_bad_rows:
            raise ValueError(f"{message} (`--skip_bad_rows true` goes on without them.)")
        logger.warning(f"Left out: {message}.")
    return features


def _first_tiles(grids: np.ndarray) -> np.ndarray:
    """The position of the first tile of each view among all tiles, `(rows, views)`."""
    counts = grids.prod(axis=2)
    return counts.cumsum().reshape(counts.shape) - counts


def _measure_grids(path: Path, dataset: Dataset, views: CaptionCollator, num_views: int) -> np.ndarray:
    """Rows and columns of tiles of each view, int64, `(rows, views, 2)`. A bad row has 0 rows and 1 column.

    They are kept in a file, whose missing or damaged parts are measured again. So the file of the features has its
    final size from the start, and a full disk is an error before the tower runs.

    Raises:
        ValueError: If a row is bad and not to be skipped, or does not hold one image.
        OSError: If the disk has no room for the grids.
    """
    shape = (len(dataset), num_views, 2)
    try:
        grids = np.lib.format.open_memmap(path, mode="r+")
        if (grids.dtype, grids.shape) != (np.int64, shape):
            raise ValueError(f"it holds {grids.dtype} {grids.shape}, not int64 {shape}")
        if grids.min() < 0 or grids.prod(axis=2).max() > views.processor.max_tiles:
            raise ValueError(f"it holds grids of more than {views.processor.max_tiles} tiles, or negative ones")
    except (OSError, ValueError) as error:
        if path.exists():
            logger.warning(f"The grids of tiles in {path} are damaged and measured again: {error}")
        grids = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=shape)  # zeros
        _reserve_disk_space(path, grids)
    unmeasured = np.flatnonzero(grids[:, -1, 1] == 0)  # a measured row has columns, even a bad one
    for row in tqdm(unmeasured, desc="Tiles", unit="image", disable=not len(unmeasured)):
        images = [_read_view(dataset[row], views, view) for view in range(num_views)]
        is_bad = any(image is None for image in images)
        grids[row] = (0, 1) if is_bad else [_cut(image, views.processor)[1] for image in images]
    grids.flush()
    return np.array(grids)


def _read_view(row: dict[str, Any], views: CaptionCollator, view: int) -> Image.Image | VideoFrames | None:
    """One view of a row's image or video; None if the row is bad."""
    views.epoch = view
    media = views.read(row)
    if isinstance(media, VideoFrames):
        return media
    images = [] if media is None else flatten_images(media)  # of a conversation, a list
    if len(images) > 1:
        raise ValueError(f"`cache_features` keeps one image of a row, but a row holds {len(images)}.")
    return images[0] if images else None


def _cut(image: Image.Image | VideoFrames, processor: EVLGenProcessor) -> tuple[list[Any], tuple[int, int]]:
    """The tiles of an image and their grid. A video is one tile."""
    if processor.max_tiles == 1 or isinstance(image, VideoFrames):
        return [image], (1, 1)
    return cut_tiles(image, tile_size(processor.image_processor), processor.max_tiles)


def _compute(
    files: FeatureFiles,
    grids: np.ndarray,
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    views: CaptionCollator,
    batch_size: int,
) -> dict[str, Any]:
    """Fills the files, from the row on at which a killed run stopped; returns the state."""
    state = files.read_state(partial=True)
    if state is None:
        state = {"done": 0, "bad_rows": {}}  # the captions of bad rows by row number
        files.write_state(state)
    arrays = [  # the features, (tiles, tokens, dim), and the places of their tokens, (tiles, tokens, 3)
        array.reshape(grids.prod(axis=2).sum(), *array.shape[-2:]) for array in files.open_to_write(not state["done"])
    ]
    starts = _first_tiles(grids)

    progress = tqdm(total=len(dataset), initial=state["done"], desc="Vision features", unit="row")
    while state["done"] < len(dataset):
        rows = range(state["done"], min(state["done"] + batch_size, len(dataset)))
        for view in range(grids.shape[1]):
            tiles = {}  # by position in the file
            for row in rows:
                image = _read_view(dataset[row], views, view) if grids[row, view].all() else None
                if image is None:
                    state["bad_rows"][str(row)] = start_of_text(dataset[row], views.data_args)
                    continue
                cut, grid = _cut(image, views.processor)
                if grid != tuple(grids[row, view]):
                    raise ValueError(f"The image of row {row} was replaced while its features were computed.")
                tiles |= dict(enumerate(cut, starts[row, view]))
            positions = list(tiles)
            for first in range(0, len(tiles), batch_size):
                chosen = positions[first : first + batch_size]
                computed = _run_tower(model, views.processor, [tiles[position] for position in chosen])
                for array, values in zip(arrays, computed, strict=True):
                    array[chosen] = values
        state["done"] = rows.stop
        for array in arrays:
            array.flush()
        files.write_state(state)
        progress.update(len(rows))
    progress.close()
    files.complete()
    return state


def _reserve_disk_space(path: Path, features: np.memmap) -> None:
    """Makes a full disk an error now, not a crash when a page is written.

    Raises:
        OSError: If the disk has no room for the features.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, features.nbytes + features.offset)
    except OSError as error:
        path.unlink()
        needed = f"{features.nbytes / 1e9:.1f} GB for the vision features"
        message = f"{path.parent} (in $HF_HOME) has no {needed}: {error.strerror}"
        raise OSError(error.errno, message) from error


@torch.no_grad()
def _run_tower(
    model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, media: list[Image.Image] | list[VideoFrames]
) -> list[np.ndarray]:
    """Features of images or videos, float16, `(images or videos, tokens, dim)`.

    For merged videos also the places of their tokens, float32, `(videos, tokens, 3)`.
    """
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
    return [features.numpy()] if places is None else [features.numpy(), places.cpu().numpy()]


def _key(model: EVLGenForConditionalGeneration, dataset: Dataset, views: CaptionCollator, num_views: int) -> str:
    """Identifies the features by everything that they depend on."""
    data_args = views.data_args
    draws = views.training and data_args.draws_views
    augmentation = (views.seed, data_args.crop_scale, data_args.horizontal_flip) if draws else ()
    digest = hashlib.sha256(repr((num_views, *augmentation)).encode())
    digest.update(views.processor.image_processor.to_json_string().encode())
    digest.update(model.config.vision_config.to_json_string().encode())
    digest.update(hash_weights(model.vision_tower.state_dict()).encode())
    digest.update(dataset._fingerprint.encode())
    if data_args.video_column:
        mode, class_token = model.config.video_mode, model.config.connector_config.class_token
        merging = mode == "merge" and (class_token, video_merging.ROUNDS, video_merging.TIME_WEIGHT)
        # The 2 is a version. It rises when the same choice reads other frames of a file.
        digest.update(repr(("video", 2, data_args.frames, mode, merging)).encode())
    elif views.processor.max_tiles > 1:
        digest.update(f"max_tiles {views.processor.max_tiles}".encode())
    if data_args.max_pixels != MAX_PIXELS:  # it decides which rows are bad
        digest.update(f"max_pixels {data_args.max_pixels}".encode())
    column, path = data_args.video_column or data_args.image_column, Value("string")
    if dataset.features[column] in (path, List(path)):  # the fingerprint does not cover the files behind paths
        paths = filter(None, flatten_images(list(dataset[column])))
        for file in filter(os.path.isfile, paths):
            status = os.stat(file)
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
