"""Opens images from any source as upright RGB images: paths, URLs, bytes, odd colour modes, EXIF rotation.

transformers' `load_image` is not used: it shows transparent parts black, clips 16-bit grey to white, and names no file
in its errors.
"""

import base64
import os
import time
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

MAX_BYTES = 512 * 2**20  # of a file from a server
MAX_PIXELS = 64_000_000  # in RGB 256 MB; a PNG of 20 KB can hold more pixels than memory does


def load_rgb_image(source: Any, timeout: float = 30.0, max_pixels: int = MAX_PIXELS) -> Any:
    """Opens an image and converts it to an upright RGB image.

    The EXIF orientation is applied. Transparent parts become white, as on paper. 16-bit grey is scaled to 8 bits.

    Args:
        source (`PIL.Image.Image`, `str`, `pathlib.Path`, `dict` or array):
            An image, a path, a URL, a base64 string (`data:image/...`) or a row of a `datasets` image column
            (`{"bytes": ..., "path": ...}`). Arrays and tensors are checked and returned unchanged: they have no mode.
        timeout (`float`, *optional*, defaults to 30.0): Seconds for a URL, until its last byte.
        max_pixels (`int`, *optional*, defaults to 64,000,000):
            Largest width times height that is decoded. The size is read from the header, before any pixel. PIL has a
            limit of its own, 179 million pixels. `PIL.Image.MAX_IMAGE_PIXELS` sets it for the whole process.

    Returns:
        `PIL.Image.Image` in mode RGB, or the array.

    Raises:
        ValueError: If the image cannot be read or has more than `max_pixels`; the message names it. If an array holds
            NaN or infinite values, or has another number of dimensions than 3. If there is no pixel.
        TypeError: If `source` is nothing of the above, or an array of no numbers.
    """
    if source is None:
        raise ValueError("`images`: None is no image.")
    if isinstance(source, np.ndarray | torch.Tensor):
        return _check_array(source)
    if not isinstance(source, Image.Image | str | Path | dict):
        raise TypeError(f"`images` must hold images, paths, URLs or arrays, but holds a {type(source).__name__}.")
    try:
        image = source if isinstance(source, Image.Image) else _open(source, timeout)
        if isinstance(image, ImageFile.ImageFile):  # an image in memory has cost its memory already
            check_size(image.width, image.height, max_pixels)
        if not image.width * image.height:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # PIL raises errors of many types for broken data
        # PIL's message has an address in memory in place of a path.
        reason = "it is no image that PIL knows" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"`images`: {_describe(source)} cannot be read: {reason}") from error


def check_size(width: int, height: int, max_pixels: int) -> None:
    """
    Raises:
        ValueError: If an image or a frame of `width` x `height` has more than `max_pixels`.
    """
    if width * height > max_pixels:
        raise ValueError(f"it has {width} x {height} pixels, more than `max_pixels`={max_pixels} allows")


def _check_array(array: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    if array.ndim != 3:
        raise ValueError(f"`images`: an array must have 3 dimensions, but has the shape {tuple(array.shape)}.")
    if 0 in array.shape:
        raise ValueError(f"`images`: an array of shape {tuple(array.shape)} has no pixels.")
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "buif":
            raise TypeError(f"`images`: an array must hold numbers, but has the dtype {array.dtype}.")
        finite = np.isfinite(array).all()
    else:  # integers are finite, and slow to check
        finite = not array.is_floating_point() or array.isfinite().all()
    if not finite:
        raise ValueError(f"`images`: an array of shape {tuple(array.shape)} holds NaN or infinite values.")
    return array


def _open(source: str | Path | dict, timeout: float) -> Image.Image:
    """Opens an image without decoding it."""
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            return Image.open(BytesIO(source["bytes"]))
        source = source["path"]
    if is_url(source):
        return Image.open(download(source, timeout))
    if str(source).startswith("data:image/"):
        return Image.open(BytesIO(base64.b64decode(source.split(",", 1)[1])))
    check_regular_file(source)
    return Image.open(source)


def is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def download(url: str, timeout: float = 30.0) -> BytesIO:
    """Reads a URL. huggingface_hub brings httpx, so the code of a checkpoint needs no further package.

    Raises:
        ValueError: If the reply is not complete after `timeout` seconds, or has more than `MAX_BYTES`.
    """
    end, content = time.monotonic() + timeout, BytesIO()
    with httpx.stream("GET", url, timeout=timeout, follow_redirects=True) as reply:
        for piece in reply.raise_for_status().iter_bytes():
            content.write(piece)
            if content.tell() > MAX_BYTES:
                raise ValueError(f"the server sends more than {MAX_BYTES / 1e6:g} MB")
            if time.monotonic() > end:  # httpx's own limit holds for each piece
                raise ValueError(f"the server has not sent the whole file in {timeout:g} seconds")
    content.seek(0)
    return content


def is_webp_gif_or_png(file: str | BytesIO) -> bool:
    """Whether a file is WebP, GIF or PNG, by its first bytes. A `BytesIO` is left at its start."""
    with nullcontext(file) if isinstance(file, BytesIO) else open(file, "rb") as content:
        start = content.read(12)
        content.seek(0)
    return start[8:] == b"WEBP" or start.startswith((b"GIF8", b"\x89PNG"))


def check_regular_file(path: str | Path) -> None:
    """
    Raises:
        ValueError: If there is something else than a file. Opening a named pipe waits until somebody writes.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is no regular file")


def _describe(source: Image.Image | str | Path | dict) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "the image"
    name = source.get("path") if isinstance(source, dict) else str(source)
    return repr(name if name is None or len(name) <= 200 else name[:200] + "…")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB. What is transparent becomes white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":  # PIL would clip all values above 255
        image = image.point(lambda value: value / 256).convert("L")
    # A palette, too, may have a transparent colour.
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")
