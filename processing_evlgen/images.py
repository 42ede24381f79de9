"""Opens images from any source as upright RGB images, and cuts large ones into tiles of the vision tower's input size.

transformers' `load_image` is not used: it shows transparent parts black, clips 16-bit grey to white, and names no file
in its errors.
"""

import base64
import math
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anyio import fail_after  # httpx brings it
from anyio.from_thread import start_blocking_portal
from huggingface_hub.utils import httpx  # as transformers: so the code of a checkpoint needs no further package
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import select_best_resolution
from transformers.image_transforms import to_pil_image
from transformers.image_utils import get_image_size, infer_channel_dimension_format

MAX_BYTES = 512 * 2**20  # of a file from a server
MAX_PIXELS = 64_000_000  # in RGB 256 MB; a PNG of 20 KB can hold more pixels than memory does
# The Bayeux Tapestry has 140. A line of 1 x 60,000 pixels fills the memory where the shortest edge becomes 224.
MAX_ASPECT_RATIO = 200
MAX_TILES = 100  # of one image; a request to a server may choose the number


def load_rgb_image(source: Any, timeout: float = 30.0, max_pixels: int = MAX_PIXELS) -> Any:
    """Opens an image and converts it to an upright RGB image.

    The EXIF orientation is applied. Transparent parts become white, as on paper. 16-bit grey is scaled to 8 bits, and
    32-bit grey, too. Its values must be from 0 to 255 or 65,535, or floats from 0 to 1 or 255.

    Args:
        source (`PIL.Image.Image`, `str`, `pathlib.Path`, `dict` or array):
            An image, a path, a URL, a base64 string (`data:image/...`) or a row of a `datasets` image column
            (`{"bytes": ..., "path": ...}`). Arrays and tensors are checked and returned unchanged: they have no mode.
        timeout (`float`, *optional*, defaults to 30.0): Seconds for a URL with its redirects, until its last byte.
        max_pixels (`int`, *optional*, defaults to 64,000,000):
            Largest width times height that is decoded; it is read from the header. PIL's own limit holds as well.

    Raises:
        ValueError:
            If the image cannot be read, has no pixel or too many, or one side is over 200 times the other. If an array
            is not finite, or has not 3 axes with 1, 3 or 4 channels.
        TypeError: If `source` is nothing of the above, or an array of no numbers.
    """
    if source is None:
        raise ValueError("`images`: None is no image.")
    if isinstance(source, np.ndarray | torch.Tensor):
        return _check_array(source)
    if not isinstance(source, Image.Image | str | Path | dict):
        raise TypeError(f"`images` must hold images, paths, URLs or arrays, but holds a {type(source).__name__}.")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(open_file(source, timeout))
        if not image.width * image.height:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        # An image in memory has cost its memory already.
        check_size(image.width, image.height, max_pixels if isinstance(image, ImageFile.ImageFile) else math.inf)
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # PIL raises errors of many types for broken data
        # PIL's message has an address in memory in place of a path.
        reason = "it is no image that PIL knows" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"`images`: {describe(source)} cannot be read: {reason}") from error


def flatten_images(images: Any) -> list[Any]:
    """Images, lists of images and 4-D arrays, nested in any way, as one list.

    transformers' `make_flat_list_of_images` refuses paths and lists of different depth.
    """
    if isinstance(images, list | tuple):
        return [image for entry in images for image in flatten_images(entry)]
    if getattr(images, "ndim", 3) == 4:  # (images, height, width, channels)
        return list(images)
    return [images]


def check_size(width: int, height: int, max_pixels: float) -> None:
    """Raises a ValueError if an image or a frame has more than `max_pixels`, or is too thin."""
    if width * height > max_pixels:
        raise ValueError(f"it has {width} x {height} pixels, more than `max_pixels`={max_pixels} allows")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"it has {width} x {height} pixels, a side over {MAX_ASPECT_RATIO} times the other")


def _check_array(array: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    shape = tuple(array.shape)
    if array.ndim != 3 or not {1, 3, 4} & {shape[0], shape[-1]}:
        wanted = "3 dimensions, and 1, 3 or 4 channels in the first or the last"
        raise ValueError(f"`images`: an array must have {wanted}, but has the shape {shape}.")
    if 0 in shape:
        raise ValueError(f"`images`: an array of shape {shape} has no pixels.")
    _, shorter, longer = sorted(shape)  # or the number of channels, of an array of 1 or 2 rows or columns
    if longer > MAX_ASPECT_RATIO * shorter:
        raise ValueError(f"`images`: an array of shape {shape} has a side over {MAX_ASPECT_RATIO} times the other.")
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "buif":
            raise TypeError(f"`images`: an array must hold numbers, but has the dtype {array.dtype}.")
        finite = np.isfinite(array).all()
    else:  # integers are finite, and slow to check
        finite = not array.is_floating_point() or array.isfinite().all()
    if not finite:
        raise ValueError(f"`images`: an array of shape {shape} holds NaN or infinite values.")
    return array


def open_file(source: str | Path | dict, timeout: float) -> str | BytesIO:
    """The path of a file, or the content of a URL, a base64 string or a row of a data set."""
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            file = BytesIO(source["bytes"])
            file.name = str(source.get("path"))  # FFmpeg knows some formats of videos by their suffix
            return file
        source = source["path"]
    source = str(source)
    if source.startswith(("http://", "https://")):
        return _download(source, timeout)
    if source.startswith("data:"):
        return BytesIO(base64.b64decode(source.split(",", 1)[1]))
    if os.path.exists(source) and not os.path.isfile(source):  # opening a named pipe waits until somebody writes
        raise ValueError("it is no regular file")
    return source


def _download(url: str, timeout: float) -> BytesIO:
    """Reads a URL. Raises a ValueError after `timeout` seconds or `MAX_BYTES`."""
    with start_blocking_portal() as portal:  # a thread with an event loop: the caller's may be running
        return portal.call(_download_in_loop, url, timeout)


async def _download_in_loop(url: str, timeout: float) -> BytesIO:
    # Of httpx, only an asynchronous client can be stopped while a server sends headers, one letter after the other.
    client, content = httpx.AsyncClient(timeout=None, follow_redirects=True), BytesIO()
    try:
        with fail_after(timeout):
            async with client, client.stream("GET", url) as reply:
                async for piece in reply.raise_for_status().aiter_bytes():
                    content.write(piece)
                    if content.tell() > MAX_BYTES:
                        raise ValueError(f"the server sends more than {MAX_BYTES / 1e6:g} MB")
    except TimeoutError as error:
        raise ValueError(f"the server has not sent the whole file in {timeout:g} seconds") from error
    content.seek(0)
    return content


def describe(source: Image.Image | str | Path | dict) -> str:
    """What an error calls an image or a video."""
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "the image"
    name = source.get("path") if isinstance(source, dict) else str(source)
    return repr(name if len(str(name)) <= 200 else str(name)[:200] + "…")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB. What is transparent becomes white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # PIL would clip all values above 255
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        image = _scale_to_bytes(image)
    # A palette, too, may have a transparent colour.
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _scale_to_bytes(image: Image.Image) -> Image.Image:
    """32-bit grey in 8 bits. No file states the range of such values, so it is the smallest that holds them all."""
    values, ranges = np.asarray(image), (1, 255) if image.mode == "F" else (255, 65_535)
    low, high = values.min(), values.max()
    largest = next((largest for largest in ranges if low >= 0 and high <= largest), None)
    if largest is None:
        raise ValueError(f"its values must be 0 to {ranges[0]} or 0 to {ranges[1]}, but are {low:g} to {high:g}")
    return Image.fromarray(np.rint(values * (255 / largest)).astype(np.uint8))


def check_max_tiles(max_tiles: Any) -> None:
    """Raises a ValueError if `max_tiles` is no integer from 1 to `MAX_TILES`."""
    if type(max_tiles) is not int or not 1 <= max_tiles <= MAX_TILES:
        raise ValueError(f"`max_tiles` must be an integer from 1 to {MAX_TILES}, but is {max_tiles!r}.")


def tile_size(image_processor: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that an image processor returns.

    Raises a ValueError if they depend on the image, or if a tile of this size would be enlarged and cropped.
    """
    crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", None) else None
    resized = dict(getattr(image_processor, "size", None) or {})
    size = dict(crop or resized)
    height, width = (size.get(name) or size.get("shortest_edge") for name in ("height", "width"))
    if not height or not width or (not crop and size.get("shortest_edge")):
        raise ValueError(f"`max_tiles` needs an image processor with a fixed height and width, but it has {size}.")
    shortest = resized.get("shortest_edge")
    resizes = getattr(image_processor, "do_resize", True)
    if crop and resizes and (shortest != min(height, width) if shortest else resized != size):
        raise ValueError(
            f"`max_tiles` needs an image processor that crops nothing from a tile, but it resizes to {resized} and "
            f"crops {size}. Set its `size` to its `crop_size`."
        )
    return height, width


def choose_tile_grid(height: int, width: int, tile: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """The rows and columns of tiles of `(height, width)` pixels that an image is cut into.

    It is the grid that keeps most of the image's pixels. Of equal grids, it is the one with the fewest tiles. So an
    image that fits into a tile is one tile. Source: the "any resolution" of LLaVA-NeXT, which pads where this one
    stretches.
    """
    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    sizes = {(rows * tile[0], columns * tile[1]): (rows, columns) for rows, columns in grids}
    return sizes[select_best_resolution((height, width), list(sizes))]


def cut_tiles(image: Any, tile: tuple[int, int], max_tiles: int) -> tuple[list[Any], tuple[int, int]]:
    """Resizes an image to a grid of tiles of `(height, width)` pixels, and cuts it.

    Returns the tiles row by row, and the grid's rows and columns. An image of one tile is returned as it is. An array
    of several tiles must hold 8-bit values, or a ValueError is raised.
    """
    if isinstance(image, Image.Image):
        size = image.height, image.width
    else:
        array = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
        channels = (1, 3) if {1, 3} & {array.shape[0], array.shape[-1]} else (4,)
        layout = infer_channel_dimension_format(array, num_channels=channels)
        size = get_image_size(array, layout)
    rows, columns = choose_tile_grid(*size, tile, max_tiles)
    if (rows, columns) == (1, 1):
        return [image], (1, 1)
    if not isinstance(image, Image.Image):
        if array.dtype != np.uint8:
            raise ValueError(f"`images`: an array of several tiles must be uint8, but is {array.dtype}.")
        image = to_rgb(to_pil_image(array, do_rescale=False, input_data_format=layout))
    height, width = tile
    image = image.resize((columns * width, rows * height), Image.Resampling.BICUBIC)
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners], (rows, columns)


def count_tiles(image_processor: Any, sizes: list[tuple[int, int]], max_tiles: int) -> list[int]:
    """The number of tiles of images of `(height, width)` pixels."""
    check_max_tiles(max_tiles)
    tile = tile_size(image_processor) if max_tiles > 1 else (1, 1)
    return [math.prod(choose_tile_grid(*size, tile, max_tiles)) for size in sizes]


def prepare_images(
    image_processor: Any, images: list[Any], max_tiles: int, arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """`pixel_values` of all tiles of images that were read, and their `image_grid_thw` if they may have several."""
    check_max_tiles(max_tiles)
    arguments = {**arguments, "return_tensors": "pt"}
    if max_tiles == 1:
        return {"pixel_values": image_processor(images, **arguments)["pixel_values"]}
    for name in ("size", "crop_size"):
        if arguments.get(name) is not None:
            raise ValueError(f"`{name}` cannot be given with `max_tiles`: tiles have the image processor's own.")
    size = tile_size(image_processor)
    cut = [cut_tiles(image, size, max_tiles) for image in images]
    pixels = image_processor([tile for tiles, _ in cut for tile in tiles], **arguments)["pixel_values"]
    # Even for images of one tile: a pipeline makes batches of images that were prepared alone.
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([(1, *grid) for _, grid in cut])}
