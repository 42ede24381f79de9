"""One row of a data set: its image or video opened, its text checked."""

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
    captions = row[data_args.caption_column]
    if not captions or not all(isinstance(c, str) and c.strip() for c in true_captions(row, data_args)):
        raise ValueError(f"`{data_args.caption_column}` must hold a caption, but is {captions!r}.")
    if data_args.prompt_column and not isinstance(row[data_args.prompt_column], str):
        raise ValueError(f"`{data_args.prompt_column}` must hold a text, but is {row[data_args.prompt_column]!r}.")


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
