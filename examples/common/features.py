"""Features of a frozen vision tower, computed once and read from disk ever after."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import constants
from PIL import Image as PILImage
from tqdm import tqdm
from transformers.utils import logging

from common.arguments import DataArguments
from common.data import CaptionCollator, caption_of
from common.files import write_whole
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import hash_weights
from processing_evlgen import EVLGenProcessor

logger = logging.get_logger(__name__)


class FeatureDataset(torch.utils.data.Dataset):
    """Rows of a data set with `vision_features` (views, tokens, dim), float16, on disk, instead of the picture."""

    def __init__(self, dataset: Dataset, features: np.ndarray, rows: list[int], image_column: str):
        self.dataset = dataset.remove_columns(image_column)
        self.features = features
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**self.dataset[row], "vision_features": self.features[row]}  # read when a batch is made of it


def cache_splits(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    train: Dataset,
    test: Dataset | None,
    arguments: DataArguments,
    seed: int,
) -> tuple[FeatureDataset, FeatureDataset | None]:
    """Runs the vision tower over both splits; over training pictures as often as `cached_views` says.

    Args:
        model, processor, arguments: As in [`cache_vision_features`].
        train, test: Rows with pictures.
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
    augmentation and data set. A run that is killed goes on where it was.

    Args:
        model, processor: The model whose vision tower runs, and the processor that prepares its pictures.
        dataset: Rows with pictures, encoded or not.
        arguments: Names the image column and says what to do with bad rows.
        augmenting: Gives the views of a picture, each by its `epoch`; by default there is one, the picture as it is.
        num_views: How many of them to keep.
        batch_size: Pictures for each run of the tower.

    Returns:
        [`FeatureDataset`], without bad rows if those are to be skipped.

    Raises:
        ValueError: If a row is bad and not to be skipped, or a feature does not fit float16.
    """
    views = augmenting or CaptionCollator(processor, arguments, training=False)
    folder = Path(constants.HF_HOME) / "evlgen_features"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(model, processor, dataset, views, num_views)}.npy"
    state_path = path.with_suffix(".json")
    with FileLock(path.with_suffix(".lock")):  # another run may want the same
        if not path.exists():
            _compute(path, state_path, model, dataset, views, num_views, batch_size)
    bad_rows = json.loads(state_path.read_text())["bad_rows"]
    if bad_rows:
        named = f"{len(bad_rows)} of {len(dataset)} rows are bad, by number and caption: {bad_rows}"
        if not arguments.skip_bad_rows:
            raise ValueError(f"{named} (`--skip_bad_rows true` goes on without them.)")
        logger.warning(f"Left out: {named}.")
    rows = [row for row in range(len(dataset)) if str(row) not in bad_rows]
    return FeatureDataset(dataset, np.load(path, mmap_mode="r"), rows, arguments.image_column)


def _compute(
    path: Path,
    state_path: Path,
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    views: CaptionCollator,
    num_views: int,
    batch_size: int,
) -> None:
    partial = path.with_suffix(".partial.npy")
    shape = (len(dataset), num_views, model.config.num_vision_tokens, model.config.vision_hidden_size)
    state = {"done": 0, "bad_rows": {}}  # the captions of rows that cannot be used
    if partial.exists() and state_path.exists():
        state = json.loads(state_path.read_text())
    mode = "r+" if state["done"] else "w+"
    features = np.lib.format.open_memmap(partial, mode=mode, dtype=np.float16, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash when a page is written
        with partial.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)

    progress = tqdm(total=len(dataset), initial=state["done"], desc="Vision features", unit="picture")
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
        write_whole(state_path, json.dumps(state))
        progress.update(len(rows))
    progress.close()
    os.replace(partial, path)


@torch.no_grad()
def _run_tower(
    model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, images: list[PILImage.Image]
) -> np.ndarray:
    """Features of pictures, float16, `(pictures, tokens, dim)`."""
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
    return digest.hexdigest()[:32]
