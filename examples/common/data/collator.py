"""Rows of a data set as a batch of model inputs, and the list of the bad ones among them.

DataLoader workers read ahead, and each has a copy of the collator. So only a batch can tell which rows were skipped
when it was made, and how far the stream behind it has been read. They count once the batch is trained on. A file then
lists them.
"""

import json
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from torchvision.transforms import InterpolationMode, v2
from transformers import BatchFeature

from common.arguments import DataArguments
from common.data.rows import Media, find_error, join_texts, read_row, skip_or_raise, split_texts
from common.data.streams import EPOCH, CaptionStream
from common.files import write_whole
from processing_evlgen import EVLGenProcessor
from processing_evlgen.videos import VideoFrames

BAD_ROWS = "bad_rows.jsonl"
STREAM_ROWS = 1000  # of a stream, which has no end, that are tried in place of bad ones


class EmptyBatchError(ValueError):
    """All rows of a batch are bad."""


class CaptionCollator:
    """Turns rows with an image, a video or cached vision features into a batch of model inputs.

    For training, images are augmented, frames are drawn from both halves of a video, and `texts_per_image` texts of
    each image are drawn; they share a row. With a `processor.image_token_range`, each batch draws its number of image
    tokens. Else images stay as they are, frames have equal distances, the first text counts, and images have
    `processor.num_image_tokens` tokens.
    """

    def __init__(self, processor: EVLGenProcessor, data_args: DataArguments, training: bool, seed: int = 0):
        self.processor = processor
        self.data_args = data_args
        self.training = training
        self.augment = build_augmentation(processor, data_args) if training else None
        self.seed = seed
        # In shared memory, as workers that persist over epochs keep the collator that they started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad_rows: list[dict[str, Any]] = []  # rows skipped so far; emptied by whoever records them

    @property
    def epoch(self) -> int:
        """The epoch that draws depend on; rows of a stream carry their own."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """Inputs and labels for training. A bad row that is not to be skipped, or no good one, raises a ValueError."""
        return self.encode_good(self.read_examples(rows))[0]

    def prompts(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """Inputs for generation: the same without captions."""
        return self.encode(self.read_examples(rows), with_labels=False)

    def read_examples(self, rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Any]]:
        """The good rows, each with its media: image(s), frames, or cached features by their names in the row.

        Features have shape `(tokens, dim)`, or `(rows of tiles, columns of tiles, tokens, dim)`. Merged videos have
        `token_places` as well, of shape `(tokens, 3)`.
        """
        if "vision_features" in rows[0]:  # of all views, on disk
            names = [name for name in ("vision_features", "token_places") if name in rows[0]]
            return [(row, {name: row[name][self.epoch % len(row[name])] for name in names}) for row in rows]
        examples = [(row, self.read(row)) for row in rows]
        examples = [(row, media) for row, media in examples if media is not None]
        if not examples:
            raise EmptyBatchError(f"None of the {len(rows)} rows of a batch can be used.")
        return examples

    def read(self, row: dict[str, Any]) -> Media | None:
        """The augmented image or video of a row in this epoch; None if the row is bad and to be skipped."""
        with self.seeded(row, row):
            try:
                media = read_row(row, self.data_args, "headtail" if self.training else "uniform")
            except ValueError as error:
                self._skip(row, error)
                return None
            if self.augment is None:
                return media
            if isinstance(media, list) and not self.data_args.video_column:  # images of a conversation
                return [self.augment(image) for image in media]
            if self.data_args.video_column:  # all frames in one call, hence alike
                return VideoFrames(self.augment(list(media)), media.times)
            return self.augment(media)

    def encode_good(
        self, examples: list[tuple[dict[str, Any], Any]], with_labels: bool = True
    ) -> tuple[BatchFeature, list[tuple[dict[str, Any], Any]]]:
        """Model inputs of the examples that can be encoded, and these examples. See [`__call__`] for the errors."""
        budget = self.draw_budget([row for row, _ in examples])  # once: it decides whether a text is too long
        if with_labels:
            examples = [(self.choose_texts(row), media) for row, media in examples]
        try:
            return self.encode(examples, with_labels, budget), examples
        except ValueError:  # of a text that is too long, say; the message knows only its place in the batch
            good, num_bad = [], len(self.bad_rows)
            for row, media in examples:
                parts = split_texts(row, self.data_args) if with_labels else [row]
                parts = [part for part in parts if self._can_encode(part, media, with_labels, budget)]
                good += [(join_texts(parts, self.data_args) if with_labels else row, media)] if parts else []
            if len(self.bad_rows) == num_bad:
                raise
        if not good:
            raise EmptyBatchError(f"None of the {len(examples)} rows of a batch can be used.")
        return self.encode(good, with_labels, budget), good

    def _can_encode(self, row: dict[str, Any], media: Any, with_labels: bool, budget: int | None) -> bool:
        try:
            self.encode([(row, media)], with_labels, budget)
        except ValueError as error:
            self._skip(row, error)
            return False
        return True

    def choose_texts(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with the texts that it has in this epoch, without bad ones."""
        if self.data_args.messages_column:
            return row
        good = []
        for part in split_texts(row, self.data_args):
            error = find_error(part, self.data_args)
            if error is None:
                good.append(part)
            else:
                self._skip(part, error)
        limit = self.data_args.texts_per_image
        if not self.training:
            good = good[:1]
        elif limit is not None and limit < len(good):
            # Seeded by the captions, not by the image, which rows with cached features lack.
            with self.seeded(row, [part[self.data_args.caption_column] for part in good]):
                good = random.sample(good, limit)
        return join_texts(good, self.data_args)

    def draw_budget(self, rows: list[dict[str, Any]]) -> int | None:
        """The number of tokens of each image or video of a training batch; None for the processor's own.

        It is drawn log-uniformly from the range. A resumed run draws it again, and so does one with cached features,
        whose rows have the same texts.
        """
        if not self.training or self.processor.image_token_range is None:
            return None
        low, high = self.processor.image_token_range
        texts = [[row[getattr(self.data_args, name)] for name in self.data_args.used_columns[1:]] for row in rows]
        with self.seeded(rows[0], texts):
            number = int(low * ((high + 1) / low) ** random.random())  # n in proportion to log((n + 1) / n)
            return min(number, high)

    def encode(
        self, examples: list[tuple[dict[str, Any], Any]], with_labels: bool = True, budget: int | None = None
    ) -> BatchFeature:
        """Model inputs of what [`read_examples`] returns; `budget` is the number of tokens of each image or video."""
        rows, media = zip(*examples, strict=True)
        inputs = self._media_inputs(list(media))
        if budget is not None:
            inputs["num_image_tokens"] = budget
        if not with_labels:
            inputs["text"] = self._prompts(rows)
        elif self.data_args.messages_column:
            inputs["messages"] = [row[self.data_args.messages_column] for row in rows]
        else:
            texts = [split_texts(row, self.data_args) for row in rows]
            inputs["suffix"] = [[part[self.data_args.caption_column] for part in parts] for parts in texts]
            column, prompt = self.data_args.prompt_column, self.data_args.prompt
            inputs["text"] = [self._prompts(parts) for parts in texts] if column else prompt
            if all(len(parts) == 1 for parts in texts):
                inputs["suffix"] = [suffix for (suffix,) in inputs["suffix"]]
                inputs["text"] = [text for (text,) in inputs["text"]] if column else prompt
        if self.data_args.video_column and "vision_features" in inputs:
            inputs |= {
                name: self._with_image_placeholders(inputs[name]) for name in ("text", "messages") if name in inputs
            }
        batch = self.processor(**inputs)
        if "token_places" in rows[0]:
            batch["token_places"] = torch.from_numpy(np.stack([cached["token_places"] for cached in media]))
        for name in ("image_budgets", "video_budgets"):
            if name in batch:  # a compiled model cannot read them from a tensor
                batch[name] = batch[name].tolist()
        return batch

    def _with_image_placeholders(self, value: Any) -> Any:
        """A text or conversations with placeholders of images in place of videos. Cached features take these."""
        if isinstance(value, str):
            return value.replace(self.processor.video_token, self.processor.image_token)
        if isinstance(value, list):
            return [self._with_image_placeholders(entry) for entry in value]
        if isinstance(value, dict):
            placed = {name: self._with_image_placeholders(entry) for name, entry in value.items()}
            return {**placed, "type": "image"} if value.get("type") == "video" else placed
        return value

    def _media_inputs(self, media: list[Any]) -> dict[str, Any]:
        if isinstance(media[0], dict):  # cached features
            images = [cached["vision_features"] for cached in media]
            tiles = [features.reshape(-1, *features.shape[-2:]) for features in images]  # (tiles, tokens, dim) each
            inputs = {"vision_features": torch.from_numpy(np.concatenate(tiles)).float()}
            if images[0].ndim == 4:
                inputs["image_grid_thw"] = torch.tensor([(1, *features.shape[:2]) for features in images])
            return inputs
        if self.data_args.video_column:
            return {"videos": media, "do_sample_frames": False}
        if self.data_args.messages_column:  # a list of images for each conversation
            media = [images if isinstance(images, list) else [images] for images in media]
        return {"images": media}

    def _prompts(self, rows: Sequence[dict[str, Any]]) -> str | list[str]:
        column, prompt = self.data_args.prompt_column, self.data_args.prompt
        if self.data_args.messages_column:
            questions = [row[self.data_args.messages_column][:-1] for row in rows]
            return [self.processor.apply_chat_template(turns, add_generation_prompt=True) for turns in questions]
        if not column:
            return prompt
        cells = [row[column] for row in rows]
        questions = [cell[0] if isinstance(cell, list | tuple) else cell for cell in cells]  # without captions, one
        return [prompt.replace("{}", question) if prompt else question for question in questions]

    def _skip(self, row: dict[str, Any], error: ValueError) -> None:
        self.bad_rows.append({"epoch": row.get(EPOCH, self.epoch), **skip_or_raise(row, self.data_args, error)})

    @contextmanager
    def seeded(self, row: dict[str, Any], content: Any) -> Iterator[None]:
        """Makes random draws depend on seed, epoch and content alone, so that a resumed run repeats them."""
        if not self.training:
            yield
            return
        seed = checksum([self.seed, row.get(EPOCH, self.epoch), content])
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.manual_seed(seed)
            try:
                yield
            finally:
                random.setstate(state)


class TrainingCollator:
    """Adds `bad_rows`, a list, to each batch, and `position` to one of a stream. [`EVLGenTrainer`] takes them out."""

    def __init__(self, collator: CaptionCollator, dataset: torch.utils.data.Dataset):
        self.collator = collator
        self.dataset = dataset

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        worker = get_worker_info()
        dataset = worker.dataset if worker else self.dataset
        self.collator.bad_rows = []
        try:
            batch = self.collator(rows)
        except EmptyBatchError:
            batch = self._first_good_batch(dataset, len(rows))
        batch["bad_rows"] = self.collator.bad_rows
        if isinstance(dataset, CaptionStream):
            batch["position"] = dataset.position
        return batch

    def _first_good_batch(self, dataset: torch.utils.data.Dataset, size: int) -> BatchFeature:
        """Stands in for a batch of bad rows alone, since every process must take the step.

        A resumed run needs the same batch, so it comes from the start of the data set, or of the reader's stream.
        Raises an EmptyBatchError if all rows of the data set are bad, or the first [`STREAM_ROWS`] of a stream.
        """
        skipped = list(self.collator.bad_rows)
        is_stream = isinstance(dataset, CaptionStream)
        rows = islice(dataset.from_start(), STREAM_ROWS) if is_stream else (dataset[i] for i in range(len(dataset)))
        for candidates in iter(lambda: list(islice(rows, size)), []):
            try:
                batch = self.collator(candidates)
            except EmptyBatchError:
                continue
            self.collator.bad_rows = skipped
            return batch
        found = f"first {STREAM_ROWS} rows of a stream" if is_stream else f"{len(dataset)} rows of the training split"
        raise EmptyBatchError(f"None of the {found} can be used.")


def add_bad_rows(folder: Path, bad_rows: list[dict[str, Any]], step: int) -> None:
    """Appends the rows skipped in a step to the list in a folder; several processes may do so at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(_line({"step": step, **row}) for row in bad_rows)
    with (folder / BAD_ROWS).open("ab", buffering=0) as file:  # one write is not torn apart by another process
        file.write(lines.encode())


def forget_bad_rows(folder: Path, step: int) -> None:
    """Removes the rows skipped after a step: training goes on from there and meets them again."""
    kept = [row for row in read_bad_rows(folder) if row["step"] <= step]
    if kept:
        write_whole(folder / BAD_ROWS, "".join(map(_line, kept)))
    else:
        (folder / BAD_ROWS).unlink(missing_ok=True)


def read_bad_rows(folder: Path) -> list[dict[str, Any]]:
    """The skipped rows listed in a folder."""
    path = folder / BAD_ROWS
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]  # a kill may have cut the last one off


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def checksum(value: Any) -> int:
    """CRC-32 of a row's content. Bytes are read as they are: their `repr` would take milliseconds an image."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        return zlib.crc32(repr([checksum(part) for part in value]).encode())
    if hasattr(value, "tobytes"):  # an array or a decoded image
        value = value.tobytes()
    return zlib.crc32(value if isinstance(value, bytes) else repr(value).encode())


class RandomCrop(v2.Transform):
    """Crops a part of an image at its own resolution; `scale` are the smallest and largest share of its area."""

    def __init__(self, scale: tuple[float, float]):
        super().__init__()
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        height, width = v2.functional.get_size(flat_inputs[0])
        share = random.uniform(*self.scale)
        limit = math.log(min(4 / 3, 1 / share))  # else the crop would be higher or wider than the image
        stretch = math.exp(random.uniform(-limit, limit))
        rows = max(1, round(height * math.sqrt(share / stretch)))
        columns = max(1, round(width * math.sqrt(share * stretch)))
        top, left = random.randint(0, height - rows), random.randint(0, width - columns)
        return {"top": top, "left": left, "height": rows, "width": columns}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return v2.functional.crop(inpt, **params)


def build_augmentation(processor: EVLGenProcessor, data_args: DataArguments) -> v2.Compose | None:
    """The paper's training transform: a random crop, resized to the tower's input, and, if requested, a flip.

    Images that may be cut into tiles are cropped at their own resolution instead. The crop has about the shape of the
    image (its sides' ratio changes by a factor from 3/4 to 4/3), and as many tiles as a photo of its size.
    """
    transforms = []
    if data_args.crop_scale is not None and processor.max_tiles > 1 and not data_args.video_column:
        transforms.append(RandomCrop(tuple(data_args.crop_scale)))
    elif data_args.crop_scale is not None:
        size = processor.image_processor.size
        transforms.append(
            v2.RandomResizedCrop(
                (size["height"], size["width"]),
                scale=tuple(data_args.crop_scale),
                interpolation=InterpolationMode.BICUBIC,
            )
        )
    if data_args.horizontal_flip:
        transforms.append(v2.RandomHorizontalFlip())
    return v2.Compose(transforms) if transforms else None
