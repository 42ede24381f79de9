"""Features of a frozen vision tower, computed once and read from disk in every epoch.

`Dataset.map` would start again at the first row after a kill, and would write float16 arrays as lists of Arrow, which
are slow to read. So the features of all rows lie in one NumPy file, with the number of finished rows beside it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from filelock import FileLock
from huggingface_hub import constants
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.rows import start_of_text
from common.files import write_whole
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import hash_weights
from processing_evlgen import EVLGenProcessor

logger = logging.get_logger(__name__)


class FeatureDataset(torch.utils.data.Dataset):
    """Good rows of a data set, with `vision_features` (views, tokens, dim) from a file in place of the image."""

    def __init__(self, images: Dataset, path: Path, rows: list[int], image_column: str):
        self.images = images if len(rows) == len(images) else images.select(rows)
        self.texts = self.images.remove_columns(image_column)
        self.path = path
        self.features = _open(path)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.texts[index], "vision_features": self.features[self.rows[index]]}  # not read from disk yet

    def __getstate__(self) -> dict[str, Any]:
        # A worker gets a pickled copy. It opens the file itself, and needs no images.
        return {**vars(self), "features": None, "images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, features=_open(state["path"]))


def cache_features(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    train: Any,
    test: Dataset | None,
    data_args: DataArguments,
    seed: int,
) -> tuple[Any, Any]:
    """Runs the vision tower over both splits; over `cached_views` crops and flips of each training image.

    The views are those that the first epochs would draw without a cache. Without `cache_features` the splits are
    returned as they are.
    """
    if not data_args.cache_features:
        return train, test
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

    The features lie in `$HF_HOME/evlgen_features`. Each tower (weights included), image processor, augmentation and
    data set has a file of its own. A run that was killed goes on where it stopped. A damaged file is computed again.
    `views` opens an image, and gives another view of it in each `epoch`.

    Raises:
        ValueError: If a row is bad and not to be skipped, or a feature does not fit float16.
        OSError: If the disk has no room for the features.
    """
    folder = Path(constants.HF_HOME) / "evlgen_features"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(model, dataset, views, num_views)}.npy"
    shape = (len(dataset), num_views, model.config.num_vision_tokens, model.config.vision_hidden_size)
    with FileLock(path.with_suffix(".lock")):  # another run may compute the same features
        state = _read_state(path, shape)
        if state is None or state["done"] < len(dataset):
            state = _compute(path, shape, model, dataset, views, batch_size)
        good = [row for row in range(len(dataset)) if str(row) not in state["bad_rows"]]
        features = FeatureDataset(dataset, path, good, views.data_args.image_column)
    if bad_rows := state["bad_rows"]:
        message = f"{len(bad_rows)} of {len(dataset)} rows are bad, by number and caption: {bad_rows}"
        if not views.data_args.skip_bad_rows:
            raise ValueError(f"{message} (`--skip_bad_rows true` goes on without them.)")
        logger.warning(f"Left out: {message}.")
    return features


def _open(path: Path, mode: str = "r", shape: tuple[int, ...] | None = None) -> np.memmap:
    """The features in a file, float16, `(rows, views, tokens, dim)`. A pickle or an archive is refused."""
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)


def _read_state(path: Path, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """The number of finished rows and the captions of bad rows; None if the file is missing, or damaged (logged).

    The shape is checked, since a file that is too short would be filled with zeros when it is opened for writing.
    """
    if not path.exists():
        return None
    try:
        state = json.loads(_state_path(path).read_text(encoding="utf-8"))
        features = _open(path)
        if (features.dtype, features.shape) != (np.float16, shape):
            raise ValueError(f"it holds {features.dtype} {features.shape}, not float16 {shape}")
        if 0 <= state["done"] <= shape[0] and isinstance(state["bad_rows"], dict):
            return state
        raise ValueError(f"its state is {state}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(f"The cached vision features in {path} are damaged and computed again: {error}")
        return None


def _state_path(path: Path) -> Path:
    return path.with_name(path.name.split(".")[0] + ".json")


def _compute(
    path: Path,
    shape: tuple[int, ...],
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    views: CaptionCollator,
    batch_size: int,
) -> dict[str, Any]:
    """Fills `path`, from the row on at which a killed run stopped; returns the state."""
    partial_path, num_views = path.with_suffix(".partial.npy"), shape[1]
    state = _read_state(partial_path, shape)
    if state is None:
        state = {"done": 0, "bad_rows": {}}  # the captions of bad rows by row number
        write_whole(_state_path(path), json.dumps(state))
    features = _open(partial_path, "r+" if state["done"] else "w+", shape)
    _reserve_disk_space(partial_path, features)

    progress = tqdm(total=len(dataset), initial=state["done"], desc="Vision features", unit="image")
    while state["done"] < len(dataset):
        rows = range(state["done"], min(state["done"] + batch_size, len(dataset)))
        for view in range(num_views):
            views.epoch = view
            images = {row: views.read(dataset[row]) for row in rows}
            for row in [row for row, image in images.items() if image is None]:
                state["bad_rows"][str(row)] = start_of_text(dataset[row], views.data_args)
            images = {row: image for row, image in images.items() if image is not None}
            if images:
                features[list(images), view] = _run_tower(model, views.processor, list(images.values()))
        state["done"] = rows.stop
        features.flush()
        write_whole(_state_path(path), json.dumps(state))
        progress.update(len(rows))
    progress.close()
    os.replace(partial_path, path)
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
    model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, images: list[Image.Image]
) -> np.ndarray:
    """Features of images, float16, `(images, tokens, dim)`."""
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    features = model.get_vision_features(pixel_values.to(model.vision_tower.device)).half().cpu()
    if not features.isfinite().all():
        raise ValueError("The vision tower's features do not fit float16, so they cannot be cached.")
    return features.numpy()


def _key(model: EVLGenForConditionalGeneration, dataset: Dataset, views: CaptionCollator, num_views: int) -> str:
    """Identifies the features by everything that they depend on."""
    data_args = views.data_args
    augmentation = (views.seed, data_args.crop_scale, data_args.horizontal_flip) if views.augment else ()
    digest = hashlib.sha256(repr((num_views, *augmentation)).encode())
    digest.update(views.processor.image_processor.to_json_string().encode())
    digest.update(model.config.vision_config.to_json_string().encode())
    digest.update(hash_weights(model.vision_tower.state_dict()).encode())
    digest.update(dataset._fingerprint.encode())
    column = data_args.image_column
    if dataset.features[column] == Value("string"):  # paths: the fingerprint does not cover the files behind them
        for file in filter(os.path.isfile, dataset[column]):
            status = os.stat(file)
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
