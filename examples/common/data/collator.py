"""Batches of model inputs, made of rows of images, videos or cached vision features, and captions."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torchvision.transforms import InterpolationMode, v2
from transformers import BatchFeature, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.data.data_arguments import DataArguments
from common.data.loading import read_row, refuse_row, true_captions
from common.data.streams import EPOCH
from processing_evlgen import EVLGenProcessor


class CaptionCollator:
    """Makes a batch of model inputs from rows of images, videos or cached vision features, and captions.

    Args:
        processor ([`EVLGenProcessor`]): Prepares the inputs.
        arguments (`DataArguments`): Columns, prompt and augmentation.
        training (`bool`):
            Whether to augment images, to draw a video's frames from its halves rather than at equal distances, and to
            draw one of several captions rather than take the first.
        seed (`int`, *optional*, defaults to 0): Of these draws.
    """

    def __init__(self, processor: EVLGenProcessor, arguments: DataArguments, training: bool, seed: int = 0):
        self.processor = processor
        self.arguments = arguments
        self.training = training
        self.augment = _augmentation(processor, arguments) if training else None
        self.seed = seed
        self.epoch = 0  # of rows that do not tell it themselves, as those of a stream do
        self.bad_rows: list[dict[str, Any]] = []  # that were skipped, until someone takes them

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """Inputs and labels for training.

        Raises:
            ValueError: If a row is bad, unless bad rows are to be skipped; then, if none is left.
        """
        rows, images = self._images(rows)
        try:
            return self._inputs(rows, images)
        except ValueError:  # a text that is too long, say; the message tells its place in the batch alone
            good = [index for index, row in enumerate(rows) if self._fits(row, _select(images, [index]))]
            if len(good) in (0, len(rows)):
                raise
        return self._inputs([rows[index] for index in good], _select(images, good))

    def _inputs(self, rows: list[dict[str, Any]], images: dict[str, Any]) -> BatchFeature:
        if self.arguments.messages_column:
            return self.processor(**images, messages=[row[self.arguments.messages_column] for row in rows])
        return self.processor(**images, text=self._text(rows), suffix=[self._caption(row) for row in rows])

    def _fits(self, row: dict[str, Any], image: dict[str, Any]) -> bool:
        """Whether inputs can be made of a row; if not, it is a bad one."""
        try:
            self._inputs([row], image)
        except ValueError as error:
            bad_rows: list[dict[str, Any]] = []
            refuse_row(row, self.arguments, error, bad_rows)
            self.bad_rows += [{"epoch": self._epoch(row), **bad} for bad in bad_rows]
            return False
        return True

    def prompts(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """Inputs for generation: the same without the captions."""
        rows, images = self._images(rows)
        return self.processor(**images, text=self._text(rows))

    def _text(self, rows: list[dict[str, Any]]) -> str | list[str]:
        if self.arguments.messages_column:
            asked = [row[self.arguments.messages_column][:-1] for row in rows]
            return [self.processor.apply_chat_template(turns, add_generation_prompt=True) for turns in asked]
        column, prompt = self.arguments.prompt_column, self.arguments.prompt
        if not column:
            return prompt
        return [prompt.replace("{}", row[column]) if prompt else row[column] for row in rows]

    def _images(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if "vision_features" in rows[0]:
            features = [row["vision_features"] for row in rows]  # (views, tokens, dim) each, on disk
            view = self.epoch % len(features[0])
            return rows, {"vision_features": torch.from_numpy(np.stack([one[view] for one in features])).float()}
        read = [(row, self.read(row)) for row in rows]
        read = [(row, image) for row, image in read if image is not None]
        if not read:
            raise ValueError(f"None of the {len(rows)} rows of a batch can be used; in a larger batch some can.")
        rows, images = zip(*read, strict=True)
        if self.arguments.video_column:
            return list(rows), {"videos": list(images), "num_frames": self.arguments.num_frames}
        if self.arguments.messages_column:  # each with its own
            images = [image if isinstance(image, list) else [image] for image in images]
        return list(rows), {"images": list(images)}

    def read(self, row: dict[str, Any]) -> PILImage.Image | list[PILImage.Image] | None:
        """A row's image or video as the model is to see it in this epoch; None if it is bad and to be skipped."""
        bad_rows: list[dict[str, Any]] = []
        with self._chance(row, row):
            image = read_row(row, self.arguments, "headtail" if self.training else "uniform", bad_rows)
            self.bad_rows += [{"epoch": self._epoch(row), **bad} for bad in bad_rows]
            # A video's frames are augmented in one call, hence alike.
            return image if image is None or self.augment is None else self.augment(image)

    def _caption(self, row: dict[str, Any]) -> str:
        captions = true_captions(row, self.arguments)
        with self._chance(row, captions):  # not of the image, which cached features do without
            return random.choice(captions) if self.training else captions[0]

    def _epoch(self, row: dict[str, Any]) -> int:
        return row.get(EPOCH, self.epoch)

    @contextmanager
    def _chance(self, row: dict[str, Any], key: Any) -> Iterator[None]:
        """Draws depend on seed, epoch and row alone, so a run that is resumed sees what an unbroken one would have."""
        if not self.training:
            yield
            return
        seed = zlib.crc32(repr((self.seed, self._epoch(row), key)).encode())
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.manual_seed(seed)
            try:
                yield
            finally:
                random.setstate(state)


def _select(images: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    """The images, videos or vision features of some rows."""
    return {
        name: value[indices] if torch.is_tensor(value) else [value[index] for index in indices]
        for name, value in images.items()
        if name != "num_frames"
    } | {name: value for name, value in images.items() if name == "num_frames"}


class SetEpoch(TrainerCallback):
    """Tells the collator the epoch, for its draws."""

    def __init__(self, collator: CaptionCollator):
        self.collator = collator

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.collator.epoch = int(state.epoch or 0)


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
