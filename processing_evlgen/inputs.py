"""What callers may hand to the processor, brought into one form."""

from typing import Any

from PIL import Image


def strings(name: str, value: str | list[str]) -> list[str]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    for entry in values:
        if not isinstance(entry, str):
            raise TypeError(f"`{name}` must be a string or a list of strings, but holds a {type(entry).__name__}.")
    return values


def flatten(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for entry in images for image in flatten(entry)]
    if getattr(images, "ndim", 3) == 4:  # a batch in one array
        return list(images)
    return [images]


def images_per_text(images: Any) -> list[int] | None:
    """How many images belong to each text, where they come as a list for each."""
    if isinstance(images, list | tuple) and images and all(isinstance(row, list | tuple) for row in images):
        return [len(row) for row in images]
    return None


def list_videos(videos: Any) -> list[Any]:
    """Videos as they come, one or several or a list for each text, as one list; a list of frames is one video."""
    if videos is None:
        return []
    if isinstance(videos, list | tuple):
        if len(videos) and (isinstance(videos[0], Image.Image) or getattr(videos[0], "ndim", None) == 3):
            return [videos]
        return [video for entry in videos for video in list_videos(entry)]
    return list(videos) if getattr(videos, "ndim", None) == 5 else [videos]


def padded_length(longest: int, limit: int, arguments: dict[str, Any]) -> int | None:
    """The length to pad to, None for no padding."""
    padding = arguments.get("padding", True)
    if arguments.get("truncation") not in (None, False, "do_not_truncate"):
        raise ValueError("`truncation` is not supported: a prompt cut off would lose its images or its question.")
    if padding in (False, "do_not_pad"):
        return None
    if padding == "max_length":
        longest = limit
    elif padding not in (True, "longest"):
        raise ValueError(f"`padding` must be True, False, 'longest' or 'max_length', but is {padding!r}.")
    multiple = arguments.get("pad_to_multiple_of") or 1
    return -(-longest // multiple) * multiple


def pad_rows(rows: list[list[int]], length: int, value: int, side: str) -> list[list[int]]:
    padding = [[value] * (length - len(row)) for row in rows]
    return [pad + row if side == "left" else row + pad for pad, row in zip(padding, rows, strict=True)]
