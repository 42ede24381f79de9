"""Cuts a large image into tiles of the vision tower's input size."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import ChannelDimension, get_image_size, infer_channel_dimension_format

from .images import to_rgb


def tile_size(image_processor: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that an image processor returns.

    Raises:
        ValueError: If they depend on the image, or a tile of this size would be enlarged and cropped.
    """
    crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", None) else None
    resized = dict(getattr(image_processor, "size", None) or {})
    size = dict(crop or resized)
    height, width = (size.get(name) or size.get("shortest_edge") for name in ("height", "width"))
    if not height or not width or (not crop and size.get("shortest_edge")):
        raise ValueError(
            f"`max_tiles` needs an image processor with a fixed height and width, but its size is {size}."
        )
    shortest = resized.get("shortest_edge")
    resizes = getattr(image_processor, "do_resize", True)
    if crop and resizes and (shortest != min(height, width) if shortest else resized != size):
        raise ValueError(
            f"`max_tiles` needs an image processor that crops nothing from a tile, but it resizes to {resized} and "
            f"crops {size}. Set its `size` to its `crop_size`."
        )
    return height, width


def choose_tile_grid(height: int, width: int, tile: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """Chooses the rows and columns of tiles that an image is cut into.

    It is the grid that keeps most of the image's pixels. Of equal grids, it is the one with the fewest tiles. So an
    image that fits into a tile is one tile. Source: the "any resolution" of LLaVA-NeXT, which pads where this one
    stretches.

    Args:
        height, width (`int`): The image's size in pixels.
        tile (`tuple[int, int]`): Height and width of a tile in pixels.
        max_tiles (`int`): Largest number of tiles, at least 1.
    """
    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    sizes = {(rows * tile[0], columns * tile[1]): (rows, columns) for rows, columns in grids}
    return sizes[select_best_resolution((height, width), list(sizes))]


def cut_tiles(image: Any, tile: tuple[int, int], max_tiles: int) -> tuple[list[Any], tuple[int, int]]:
    """Resizes an image to a grid of tiles, and cuts it.

    Args:
        image (`PIL.Image.Image` or array): The image. An array holds 8-bit values.
        tile (`tuple[int, int]`): Height and width of a tile in pixels.
        max_tiles (`int`): Largest number of tiles, at least 1.

    Returns:
        The tiles row by row, and the grid's rows and columns. An image of one tile is returned as it is.

    Raises:
        ValueError: If an array that needs several tiles does not hold 8-bit values.
    """
    size = (image.height, image.width) if isinstance(image, Image.Image) else get_image_size(image, _layout(image))
    rows, columns = choose_tile_grid(*size, tile, max_tiles)
    if (rows, columns) == (1, 1):
        return [image], (1, 1)
    height, width = tile
    image = _to_image(image).resize((columns * width, rows * height), Image.Resampling.BICUBIC)
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners], (rows, columns)


def _layout(array: Any) -> ChannelDimension:
    has_alpha = not {1, 3} & {array.shape[0], array.shape[-1]}
    return infer_channel_dimension_format(array, num_channels=(4,) if has_alpha else (1, 3))


def _to_image(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    array = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
    if array.dtype != np.uint8:
        raise ValueError(f"`images`: an array of several tiles must be uint8, but is {array.dtype}.")
    if _layout(array) == ChannelDimension.FIRST:
        array = array.transpose(1, 2, 0)
    return to_rgb(Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array))
