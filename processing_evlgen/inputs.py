"""Brings the processor's inputs into flat lists.

transformers' `make_flat_list_of_images` and `make_batched_videos` do not serve here. The first refuses paths and lists
of different depth. The second drops `Path`s and rows of data sets, and refuses frames of different sizes.
"""

from typing import Any

from PIL import Image


def list_strings(name: str, value: str | list[str]) -> list[str]:
    """One string or several as a list; `name` is the argument's, for the error."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    for entry in values:
        if not isinstance(entry, str):
            raise TypeError(f"`{name}` must be a string or a list of strings, but holds a {type(entry).__name__}.")
    return values


def flatten_images(images: Any) -> list[Any]:
    """Images, lists of images and 4-D arrays, nested in any way, as one list."""
    if isinstance(images, list | tuple):
        return [image for entry in images for image in flatten_images(entry)]
    if getattr(images, "ndim", 3) == 4:  # (images, height, width, channels)
        return list(images)
    return [images]


def count_images_per_text(images: Any) -> list[int] | None:
    """The number of images of each text, if each text has its own list of images."""
    if isinstance(images, list | tuple) and images and all(isinstance(row, list | tuple) for row in images):
        return [len(row) for row in images]
    return None


def flatten_videos(videos: Any) -> list[Any]:
    """Videos, lists of videos and 5-D arrays, nested in any way, as one list. A list of frames is one video."""
    if videos is None:
        return []
    if isinstance(videos, list | tuple):
        if len(videos) and (isinstance(videos[0], Image.Image) or getattr(videos[0], "ndim", None) == 3):
            return [videos]
        return [video for entry in videos for video in flatten_videos(entry)]
    return list(videos) if getattr(videos, "ndim", None) == 5 else [videos]  # (videos, frames, height, width, 3)
