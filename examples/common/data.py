"""Pictures with captions, from the demo, a folder, files or the Hub, and the batches that are made of them."""

import random
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset
from torchvision.transforms import InterpolationMode, v2
from transformers import BatchFeature
from transformers.utils import logging

from common.arguments import DataArguments
from common.demo_data import DEMO_DATASETS, load_demo_dataset
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import load_rgb_image

logger = logging.get_logger(__name__)


def load_captions(arguments: DataArguments) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Loads the training and the held-out split. Pictures stay encoded until a batch is made of them.

    Returns:
        The training split, and the held-out split or None.

    Raises:
        ValueError: If a split or a column does not exist; the message names those that do.
    """
    splits = _load_splits(arguments)
    train = _take(splits, "train_split", arguments, arguments.max_train_samples)
    if not arguments.test_split:
        return train, None
    return train, _take(splits, "test_split", arguments, arguments.max_test_samples)


def _load_splits(arguments: DataArguments) -> DatasetDict | IterableDatasetDict:
    if arguments.dataset in DEMO_DATASETS:
        return load_demo_dataset(arguments.dataset)
    return load_dataset(
        arguments.dataset,
        arguments.dataset_config,
        data_files=arguments.data_files,
        streaming=arguments.streaming,
    )


def _take(splits: Any, argument: str, arguments: DataArguments, limit: int | None) -> Dataset | IterableDataset:
    name = getattr(arguments, argument)
    if name not in splits:
        hint = "" if argument == "train_split" else "; leave it empty to train without held-out pictures"
        raise ValueError(f"`{argument}` is {name!r}, but the data set has {sorted(splits)}{hint}.")
    dataset = splits[name]
    columns = dataset.column_names or list(next(iter(dataset)))  # a stream may not know its columns
    for column_argument in ("image_column", "caption_column"):
        column = getattr(arguments, column_argument)
        if column not in columns:
            raise ValueError(f"`{column_argument}` is {column!r}, but the data set has {columns}.")
    if dataset.features is not None and isinstance(dataset.features[arguments.image_column], Image):
        dataset = dataset.cast_column(arguments.image_column, Image(decode=False))
    dataset = dataset.select_columns([arguments.image_column, arguments.caption_column])
    if limit is None:
        return dataset
    return (
        dataset.take(limit)
        if isinstance(dataset, IterableDataset)
        else dataset.select(range(min(limit, len(dataset))))
    )


class CaptionCollator:
    """Makes a batch of model inputs from rows of pictures, or of cached vision features, and captions.

    Args:
        processor ([`EVLGenProcessor`]): Prepares the inputs.
        arguments (`DataArguments`): Columns, prompt and augmentation.
        training (`bool`): Whether to augment pictures, and to draw one of several captions rather than take the first.
    """

    def __init__(self, processor: EVLGenProcessor, arguments: DataArguments, training: bool):
        self.processor = processor
        self.arguments = arguments
        self.training = training
        self.augment = _augmentation(processor, arguments) if training else None
        self.num_bad_images = 0

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """Inputs and labels for training.

        Raises:
            ValueError: If a picture cannot be read, unless bad pictures are to be skipped; then, if none is left.
        """
        rows, pictures = self._pictures(rows)
        return self.processor(**pictures, text=self.arguments.prompt, suffix=[self._caption(row) for row in rows])

    def prompts(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """Inputs for generation: the same without the captions."""
        return self.processor(**self._pictures(rows)[1], text=self.arguments.prompt)

    def _pictures(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if "vision_features" in rows[0]:
            features = torch.stack([row["vision_features"] for row in rows])  # (batch, tokens, dim)
            return rows, {"vision_features": features.float()}
        read = [(row, image) for row in rows if (image := self._read(row)) is not None]
        if not read:
            raise ValueError(f"None of the {len(rows)} pictures of a batch can be read.")
        rows, images = zip(*read, strict=True)
        return list(rows), {"images": list(images) if self.augment is None else [self.augment(i) for i in images]}

    def _read(self, row: dict[str, Any]) -> Any | None:
        try:
            return load_rgb_image(row[self.arguments.image_column])
        except ValueError as error:
            if not self.arguments.skip_bad_images:
                raise
            self.num_bad_images += 1
            logger.warning(f"Skipped picture {self.num_bad_images} that cannot be read: {error}")
            return None

    def _caption(self, row: dict[str, Any]) -> str:
        captions = row[self.arguments.caption_column]
        if isinstance(captions, str):
            return captions
        return random.choice(captions) if self.training else captions[0]


def _augmentation(processor: EVLGenProcessor, arguments: DataArguments) -> v2.Compose | None:
    """The paper's training transform: a random resized crop and, if asked for, a flip."""
    transforms = []
    if arguments.crop_scale is not None:
        size = processor.image_processor.size
        transforms.append(
            v2.RandomResizedCrop(
                (size["height"], size["width"]),
                scale=tuple(arguments.crop_scale),
                interpolation=InterpolationMode.BICUBIC,
            )
        )
    if arguments.horizontal_flip:
        transforms.append(v2.RandomHorizontalFlip())
    return v2.Compose(transforms) if transforms else None
