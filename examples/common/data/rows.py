"""One row of a data set: its image or video opened, its texts checked, split and joined."""

import hashlib
from collections.abc import Iterable
from typing import Any

from PIL import Image
from transformers.utils import logging

from common.arguments import DataArguments
from processing_evlgen.conversations import check_conversation
from processing_evlgen.images import load_rgb_image
from processing_evlgen.videos import load_rgb_frames

logger = logging.get_logger(__name__)

Media = Image.Image | list[Image.Image]


def read_row(row: dict[str, Any], data_args: DataArguments, frame_sampling: str = "uniform") -> Media:
    """Opens the image, images or frames of a row in RGB and checks its text. A ValueError says why a row is bad."""
    check_text(row, data_args)
    return open_media(row, data_args, frame_sampling)


def open_media(row: dict[str, Any], data_args: DataArguments, frame_sampling: str = "uniform") -> Media:
    """Opens the image or video of a row without a look at its text."""
    if data_args.video_column:
        settings = {"sampling": frame_sampling, "max_pixels": data_args.max_pixels, **data_args.frames}
        return load_rgb_frames(row[data_args.video_column], **settings)
    images = row[data_args.image_column]
    if isinstance(images, list):
        return [load_rgb_image(image, max_pixels=data_args.max_pixels) for image in images]
    return load_rgb_image(images, max_pixels=data_args.max_pixels)


def check_text(row: dict[str, Any], data_args: DataArguments) -> None:
    """Raises a ValueError if a row has no caption or question, or its conversation does not fit its images."""
    if data_args.messages_column:
        num_images, num_videos = (0, 1) if data_args.video_column else (count_images(row[data_args.image_column]), 0)
        if num_images == num_videos == 0:
            raise ValueError(f"`{data_args.image_column}` holds no image.")
        check_conversation(row[data_args.messages_column], num_images, num_videos)
        return
    errors = [find_error(part, data_args) for part in split_texts(row, data_args)]
    bad = [error for error in errors if error is not None]
    if bad and (len(bad) == len(errors) or not data_args.skip_bad_rows):
        raise bad[0]


def find_error(part: dict[str, Any], data_args: DataArguments) -> ValueError | None:
    """What a row with one text has wrong, if anything."""
    caption, prompt = (part.get(name or "") for name in (data_args.caption_column, data_args.prompt_column))
    if not isinstance(caption, str) or not caption.strip():
        return ValueError(f"`{data_args.caption_column}` must hold a caption, but is {caption!r}.")
    if data_args.prompt_column and not isinstance(prompt, str):
        return ValueError(f"`{data_args.prompt_column}` must hold a text, but is {prompt!r}.")
    return None


def split_texts(row: dict[str, Any], data_args: DataArguments) -> list[dict[str, Any]]:
    """A row for each text of an image; a conversation stays whole. Lists that do not fit raise a ValueError."""
    if data_args.messages_column:
        return [row]
    captions = row[data_args.caption_column]
    captions = list(captions) if isinstance(captions, list | tuple) else [captions]
    if not captions:
        raise ValueError(f"`{data_args.caption_column}` must hold a caption, but is [].")
    column = data_args.prompt_column
    if not column:
        return [{**row, data_args.caption_column: caption} for caption in captions]
    prompts = row[column] if isinstance(row[column], list | tuple) else [row[column]] * len(captions)
    if len(prompts) != len(captions):
        raise ValueError(f"`{column}` holds {len(prompts)} texts, but `{data_args.caption_column}` {len(captions)}.")
    pairs = zip(prompts, captions, strict=True)
    return [{**row, column: prompt, data_args.caption_column: caption} for prompt, caption in pairs]


def join_texts(parts: list[dict[str, Any]], data_args: DataArguments) -> dict[str, Any]:
    """The first row with lists of the texts of all: the opposite of [`split_texts`]."""
    columns = [getattr(data_args, name) for name in data_args.used_columns[1:]]
    return parts[0] if data_args.messages_column else {**parts[0], **{c: [part[c] for part in parts] for c in columns}}


def group_rows(rows: Iterable[dict[str, Any]], data_args: DataArguments) -> list[dict[str, Any]]:
    """Joins the rows that have the same value in the column `group_by`. One without a value stays alone."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    bad = []
    for number, row in enumerate(rows):
        key = row.get(data_args.group_by or "")
        if isinstance(key, dict) and key.keys() == {"bytes", "path"}:  # a cell of images
            key = key["path"] if key["bytes"] is None else hashlib.sha256(key["bytes"]).hexdigest()
        if key is not None and not isinstance(key, str | int):
            raise ValueError(
                f"`group_by`: {data_args.group_by!r} must hold names, whole numbers or images, but holds {key!r:.80}."
            )
        try:
            parts = split_texts(row, data_args)
        except ValueError:  # it is named where its turn comes
            bad.append(row)
            continue
        groups.setdefault((number,) if key is None else key, []).extend(parts)
    return [*(join_texts(parts, data_args) for parts in groups.values()), *bad]


def true_captions(row: dict[str, Any], data_args: DataArguments) -> list[str]:
    """The captions of a row, one or several; of a conversation the assistant's last turn."""
    if data_args.messages_column:
        content = row[data_args.messages_column][-1]["content"]
        return [content if isinstance(content, str) else "".join(part["text"] or "" for part in content)]
    captions = row[data_args.caption_column]
    return [captions] if isinstance(captions, str) else list(captions)


def count_images(images: Any) -> int:
    """Number of images in a cell, which holds one image or a list."""
    return len(images) if isinstance(images, list) else 1


def start_of_text(row: dict[str, Any], data_args: DataArguments) -> str:
    """The first 80 characters of a row's text, valid or not, to find the row by."""
    return str(row[data_args.messages_column or data_args.caption_column])[:80]


def skip_or_raise(row: dict[str, Any], data_args: DataArguments, error: ValueError) -> dict[str, str]:
    """Logs a bad row and returns its entry in the list of skipped rows; without `skip_bad_rows` raises its error."""
    name = f"the row with the caption {start_of_text(row, data_args)!r}"
    if row.get("__key__"):  # of a WebDataset
        name += f" ({row['__key__']} in {row['__url__']})"
    if not data_args.skip_bad_rows:
        raise ValueError(f"{name}: {error} (`--skip_bad_rows true` goes on without it.)") from error
    logger.warning(f"Skipped {name}: {error}")
    return {"row": name, "error": str(error)}
