"""Pictures with captions, from the demo, a folder, files or the Hub, and the batches that are made of them."""

import random
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset
from PIL import Image as PILImage
from torchvision.transforms import InterpolationMode, v2
from transformers import BatchFeature
from transformers.utils import logging

from common.arguments import DataArguments
from common.demo_data import DEMO_DATASETS, load_demo_dataset
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import load_rgb_image

logger = logging.get_logger(__name__)


def load_captions(arguments: DataArguments, seed: int) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Loads the training and the held-out split. Pictures stay encoded until a batch is made of them.

    Args:
        arguments: Which data set, splits and columns.
        seed: For shuffling a stream, in which the Trainer cannot draw.

    Returns:
        The training split, and the held-out split or None. All held-out pictures can be read.

    Raises:
        ValueError: If a split or a column does not exist; the message names those that do. If a held-out picture
            cannot be read and is not to be skipped.
    """
    if arguments.streaming and arguments.cache_features:
        raise ValueError("`cache_features` needs the whole data set, so it cannot be set with `streaming`.")
    if arguments.cache_features and (arguments.crop_scale or arguments.horizontal_flip):
        raise ValueError("`cache_features` keeps one view of a picture: unset `crop_scale` and `horizontal_flip`.")
    if arguments.streaming and arguments.test_split and arguments.max_test_samples is None:
        raise ValueError("`streaming` needs `max_test_samples`, or an empty `test_split`.")
    splits = _load_splits(arguments)
    train = _take(splits, "train_split", arguments, arguments.max_train_samples)
    if arguments.streaming:
        train = train.shuffle(seed=seed)
    if not arguments.test_split:
        return train, None
    test = _take(splits, "test_split", arguments, arguments.max_test_samples)
    if isinstance(test, IterableDataset):  # it is read again and again, and in another order
        test = Dataset.from_list(list(test), features=test.features)
    return train, _drop_unreadable(test, arguments)


def _drop_unreadable(dataset: Dataset, arguments: DataArguments) -> Dataset:
    column = arguments.image_column
    rows = [i for i, source in enumerate(dataset[column]) if read_picture(source, f"row {i}", arguments) is not None]
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def read_picture(source: Any, place: str, arguments: DataArguments) -> PILImage.Image | None:
    """Opens a picture of a data set.

    Args:
        source: What the data set's image column holds.
        place: Where it stands, for messages.
        arguments: Says what to do with unreadable pictures.

    Returns:
        The picture in RGB, or None if it cannot be read and is to be skipped, which is logged.

    Raises:
        ValueError: If it cannot be read and is not to be skipped.
    """
    try:
        return load_rgb_image(source)
    except ValueError as error:
        if not arguments.skip_bad_images:
            raise ValueError(f"{place}: {error} Set skip_bad_images to go on without it.") from error
        logger.warning(f"Skipped {place}: {error}")
        return None


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


def true_captions(row: dict[str, Any], arguments: DataArguments) -> list[str]:
    """The captions of a row, of which there may be one or several."""
    captions = row[arguments.caption_column]
    return [captions] if isinstance(captions, str) else list(captions)


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
        self.num_bad_images = torch.zeros((), dtype=torch.int64).share_memory_()  # workers count as well

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
        column = self.arguments.image_column
        read = [(row, read_picture(row[column], "a picture", self.arguments)) for row in rows]
        read = [(row, image) for row, image in read if image is not None]
        self.num_bad_images += len(rows) - len(read)
        if not read:
            raise ValueError(f"None of the {len(rows)} pictures of a batch can be read.")
        rows, images = zip(*read, strict=True)
        return list(rows), {"images": list(images) if self.augment is None else [self.augment(i) for i in images]}

    def _caption(self, row: dict[str, Any]) -> str:
        captions = true_captions(row, self.arguments)
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
