"""Features of a frozen vision tower, computed once and read from disk ever after."""

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
from PIL import Image as PILImage
from tqdm import tqdm
from transformers.utils import logging

from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.loading import caption_of
from common.files import write_whole
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import hash_weights
from processing_evlgen import EVLGenProcessor

logger = logging.get_logger(__name__)


class FeatureDataset(torch.utils.data.Dataset):
    """Rows of a data set with `vision_features` (views, tokens, dim), float16, on disk, instead of the image."""

    def __init__(self, dataset: Dataset, path: Path, rows: list[int], image_column: str):
        self.dataset = dataset.remove_columns(image_column)
        self.path = path
        self.features = _open(path)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**self.dataset[row], "vision_features": self.features[row]}  # read when a batch is made of it

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "features": None}  # which would be copied as a whole to each reading process

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, features=_open(state["path"]))


def cache_splits(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    train: Dataset,
    test: Dataset | None,
    arguments: DataArguments,
    seed: int,
) -> tuple[FeatureDataset, FeatureDataset | None]:
    """Runs the vision tower over both splits; over training images as often as `cached_views` says.

    Args:
        model, processor, arguments: As in [`cache_vision_features`].
        train, test: Rows with images.
        seed: Of crops and flips. The views are those of the first epochs without a cache.
    """
    views = CaptionCollator(processor, arguments, training=True, seed=seed)
    train = cache_vision_features(model, processor, train, arguments, views, arguments.cached_views or 1)
    return train, None if test is None else cache_vision_features(model, processor, test, arguments)


def cache_vision_features(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    dataset: Dataset,
    arguments: DataArguments,
    augmenting: CaptionCollator | None = None,
    num_views: int = 1,
    batch_size: int = 32,
) -> FeatureDataset:
    """Runs the vision tower over a data set, or finds that it was done before.

    The features lie in `$HF_HOME/evlgen_features`, in one file for each tower (weights included), image processor,
    augmentation and data set. A run that is killed goes on where it was; a file that is damaged is computed again.

    Args:
        model, processor: The model whose vision tower runs, and the processor that prepares its images.
        dataset: Rows with images, encoded or not.
        arguments: Names the image column and says what to do with bad rows.
        augmenting: Gives the views of an image, each by its `epoch`; by default there is one, the image as it is.
        num_views: How many of them to keep.
        batch_size: Images for each run of the tower.

    Returns:
        [`FeatureDataset`], without bad rows if those are to be skipped.

    Raises:
        ValueError: If a row is bad and not to be skipped, or a feature does not fit float16.
        OSError: If the disk has no room for the features.
    """
    views = augmenting or CaptionCollator(processor, arguments, training=False)
    folder = Path(constants.HF_HOME) / "evlgen_features"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(model, processor, dataset, views, num_views)}.npy"
    shape = (len(dataset), num_views, model.config.num_vision_tokens, model.config.vision_hidden_size)
    with FileLock(path.with_suffix(".lock")):  # another run may want the same
        state = _read_state(path, shape)
        if state is None or state["done"] < len(dataset):
            state = _compute(path, shape, model, dataset, views, batch_size)
        rows = [row for row in range(len(dataset)) if str(row) not in state["bad_rows"]]
        features = FeatureDataset(dataset, path, rows, arguments.image_column)
    bad_rows = state["bad_rows"]
    if bad_rows:
        named = f"{len(bad_rows)} of {len(dataset)} rows are bad, by number and caption: {bad_rows}"
        if not arguments.skip_bad_rows:
            raise ValueError(f"{named} (`--skip_bad_rows true` goes on without them.)")
        logger.warning(f"Left out: {named}.")
    return features


def _open(path: Path, mode: str = "r", shape: tuple[int, ...] | None = None) -> np.memmap:
    """The features in a file, float16, `(rows, views, tokens, dim)`; a pickle or archive of that name is not read."""
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)


def _read_state(path: Path, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """How many rows of a file are done, and captions of bad ones; None if it is missing, or damaged, which is logged.

    A file that is too short would be filled up with zeros when it is opened for writing.
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
    """Fills `path` as a whole, or goes on with what a run that was killed has left; gives its state."""
    partial, num_views = path.with_suffix(".partial.npy"), shape[1]
    state = _read_state(partial, shape)
    if state is None:
        state = {"done": 0, "bad_rows": {}}  # the captions of rows that cannot be used
        write_whole(_state_path(path), json.dumps(state))
    features = _open(partial, "r+" if state["done"] else "w+", shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash when a page is written
        try:
            with partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, features.nbytes + features.offset)
        except OSError as error:
            partial.unlink()
            needed = f"{features.nbytes / 1e9:.1f} GB for the vision features"
            message = f"{path.parent} (in $HF_HOME) has no {needed}: {error.strerror}"
            raise OSError(error.errno, message) from error

    progress = tqdm(total=len(dataset), initial=state["done"], desc="Vision features", unit="image")
    while state["done"] < len(dataset):
        rows = range(state["done"], min(state["done"] + batch_size, len(dataset)))
        for view in range(num_views):
            views.epoch = view
            images = {row: views.read(dataset[row]) for row in rows}
            for row in [row for row, image in images.items() if image is None]:
                state["bad_rows"][str(row)] = caption_of(dataset[row], views.arguments)
            images = {row: image for row, image in images.items() if image is not None}
            if images:
                features[list(images), view] = _run_tower(model, views.processor, list(images.values()))
        state["done"] = rows.stop
        features.flush()
        write_whole(_state_path(path), json.dumps(state))
        progress.update(len(rows))
    progress.close()
    os.replace(partial, path)
    return state


@torch.no_grad()
def _run_tower(
    model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, images: list[PILImage.Image]
) -> np.ndarray:
    """Features of images, float16, `(images, tokens, dim)`."""
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    features = model.get_vision_features(pixel_values.to(model.vision_tower.device)).half().cpu()
    if not features.isfinite().all():
        raise ValueError("The vision tower's features do not fit float16, so they cannot be cached.")
    return features.numpy()


def _key(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    dataset: Dataset,
    views: CaptionCollator,
    num_views: int,
) -> str:
    augmentation = (views.seed, views.arguments.crop_scale, views.arguments.horizontal_flip) if views.augment else ()
    digest = hashlib.sha256(repr((num_views, *augmentation)).encode())
    digest.update(processor.image_processor.to_json_string().encode())
    digest.update(model.config.vision_config.to_json_string().encode())
    digest.update(hash_weights(model.vision_tower.state_dict()).encode())
    digest.update(dataset._fingerprint.encode())
    column = views.arguments.image_column
    if dataset.features[column] == Value("string"):  # paths, whose images the fingerprint does not tell
        for file in filter(os.path.isfile, dataset[column]):
            status = os.stat(file)
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
