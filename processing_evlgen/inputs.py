"""Lists the processor's arguments, brings its inputs into flat lists, and checks them.

transformers' `make_flat_list_of_images` and `make_batched_videos` do not serve here. The first refuses paths and lists
of different depth. The second drops `Path`s and rows of data sets, and refuses frames of different sizes.
"""

import math
from typing import Any

import torch
from PIL import Image
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, VideosKwargs

MAX_TILES = 100  # of one image; a request to a server may choose the number


class EVLGenImagesKwargs(ImagesKwargs, total=False):
    max_pixels: int | None
    max_tiles: Any  # the processor checks these, and names them
    num_image_tokens: Any


class EVLGenVideosKwargs(VideosKwargs, total=False):
    max_pixels: int | None
    num_video_tokens: Any
    frame_sampling: str | None
    num_frames: Any  # `FrameChoice` checks these, and names them
    fps: Any


class EVLGenProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: EVLGenImagesKwargs
    videos_kwargs: EVLGenVideosKwargs
    _defaults = {}  # transformers < 5.19 reads it


def check_given(
    images: Any,
    text: Any,
    suffix: Any,
    videos: Any,
    messages: Any,
    vision_features: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
    encoded_video: Any,
) -> None:
    """
    Raises:
        ValueError: If nothing is given, two arguments exclude each other, or grids do not fit the features.
        TypeError: If `encoded_video` is no output of `encode_video`.
    """
    if all(given is None for given in (images, videos, text, messages, vision_features, encoded_video)):
        raise ValueError(
            "At least one of `images`, `videos`, `text`, `messages`, `vision_features` and `encoded_video` "
            "must be given."
        )
    if messages is not None and (text is not None or suffix is not None):
        raise ValueError("`messages` is given instead of `text` and `suffix`, not together with them.")
    if images is not None and vision_features is not None:
        raise ValueError("Only one of `images` and `vision_features` can be given.")
    if image_grid_thw is not None:
        check_grids(image_grid_thw, vision_features)
    if videos is not None and encoded_video is not None:
        raise ValueError("Only one of `videos` and `encoded_video` can be given.")
    if encoded_video is not None and not hasattr(encoded_video, "pooler_output"):
        raise TypeError(f"`encoded_video` must be an output of `encode_video`, but is {type(encoded_video).__name__}.")


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


def flatten_metadata(metadata: Any) -> list[Any]:
    """Metadata of videos, nested in any way, as one list."""
    if isinstance(metadata, list | tuple):
        return [entry for row in metadata for entry in flatten_metadata(row)]
    return [] if metadata is None else [metadata]


def is_count(value: Any) -> bool:
    """Whether a value is an integer of 1 or more. True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def list_budgets(
    name: str, given: Any, count: int, default: int | None, image_token_range: list[int] | None
) -> list[int]:
    """The number of tokens of each of `count` images or videos: those given, or one number for all.

    Raises:
        ValueError: If `given`, the argument `name`, is out of range, or does not hold `count` numbers.
    """
    given = default if given is None else given
    is_list = isinstance(given, list | tuple)
    numbers = list(given) if is_list else [given]
    if is_list and len(numbers) != count:
        raise ValueError(f"`{name}` holds {len(numbers)} numbers, but there are {count} images or videos.")
    if not all(map(is_count, numbers)):
        raise ValueError(f"`{name}` must be an integer of 1 or more, or a list of these, but is {given!r}.")
    low, high = image_token_range or (1, math.inf)
    if not all(low <= number <= high for number in numbers):
        raise ValueError(f"`{name}` must be from {low} to {high}, the `image_token_range`, but is {given}.")
    return numbers if is_list else numbers * count


def check_num_image_tokens(number: Any, image_token_range: list[int] | None) -> None:
    """
    Raises:
        ValueError: If `number` is no integer of 1 or more, or outside of the range.
    """
    if not is_count(number):
        raise ValueError(f"`num_image_tokens` must be an integer of 1 or more, but is {number!r}.")
    list_budgets("num_image_tokens", number, 1, None, image_token_range)


def check_max_tiles(max_tiles: Any) -> None:
    """
    Raises:
        ValueError: If `max_tiles` is no integer from 1 to `MAX_TILES`.
    """
    if not is_count(max_tiles) or max_tiles > MAX_TILES:
        raise ValueError(f"`max_tiles` must be an integer from 1 to {MAX_TILES}, but is {max_tiles!r}.")


def check_token_range(image_token_range: Any) -> list[int] | None:
    """The smallest and the largest number of tokens of an image, as a list.

    Raises:
        ValueError: If it is not None and does not hold two integers of 1 or more, the smaller one first.
    """
    if image_token_range is None:
        return None
    pair = list(image_token_range) if isinstance(image_token_range, list | tuple) else []
    if len(pair) != 2 or not all(map(is_count, pair)) or pair[0] > pair[1]:
        raise ValueError(
            "`image_token_range` must hold the smallest and the largest number of tokens, integers of 1 or more, but "
            f"is {image_token_range!r}."
        )
    return pair


def check_grids(image_grid_thw: torch.Tensor | list[list[int]], vision_features: torch.Tensor | None) -> None:
    """
    Raises:
        ValueError: If grids, `(images, 3)`, do not describe the tiles of `vision_features`, `(tiles, tokens, dim)`.
    """
    if vision_features is None:
        raise ValueError(
            "`image_grid_thw` is given beside `vision_features` alone. The processor cuts `images` itself."
        )
    image_grid_thw = torch.as_tensor(image_grid_thw)
    shape = tuple(image_grid_thw.shape)
    if len(shape) != 2 or shape[1] != 3:
        raise ValueError(f"`image_grid_thw` must have shape (images, 3), but has {shape}.")
    tiles = int(image_grid_thw.prod(dim=1).sum())
    if tiles != len(vision_features):
        raise ValueError(
            f"`image_grid_thw` is {image_grid_thw.tolist()}, {tiles} tiles together, but `vision_features` holds "
            f"{len(vision_features)}."
        )
