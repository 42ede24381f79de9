"""Images as they come (paths, URLs, odd colour modes, rotated by a camera) to upright RGB."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError


def load_rgb_image(source: Any, timeout: float = 30.0) -> Any:
    """Opens an image and turns it into an upright RGB image.

    The EXIF orientation is applied; transparent parts show white, as on paper; 16-bit grey is scaled to 8 bits.

    Args:
        source (`PIL.Image.Image`, `str`, `pathlib.Path`, `dict` or array):
            An image, a path, a URL, a base64 string (`data:image/...`) or a row of a `datasets` image column
            (`{"bytes": ..., "path": ...}`). Arrays and tensors are returned as they are: they have no mode to read.
        timeout (`float`, *optional*, defaults to 30.0): Seconds to wait for a URL.

    Returns:
        `PIL.Image.Image` in mode RGB, or the array.

    Raises:
        ValueError: If the image cannot be read; the message names it.
    """
    if source is None:
        raise ValueError("`images`: None is no image.")
    if isinstance(source, Image.Image):
        image, name = source, getattr(source, "filename", "") or "the image"
    elif isinstance(source, str | Path | dict):
        image, name = _open(source, timeout), _describe(source)
    else:
        return source
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # what PIL raises for broken or oversized data is of many kinds
        raise ValueError(f"`images`: {name} cannot be read: {error}") from error


def _open(source: str | Path | dict, timeout: float) -> Image.Image:
    try:
        if isinstance(source, dict):
            return Image.open(source["path"] if source.get("bytes") is None else BytesIO(source["bytes"]))
        if str(source).startswith(("http://", "https://")):
            response = httpx.get(source, timeout=timeout, follow_redirects=True).raise_for_status()
            return Image.open(BytesIO(response.content))
        if str(source).startswith("data:image/"):
            return Image.open(BytesIO(base64.b64decode(source.split(",", 1)[1])))
        return Image.open(source)
    except UnidentifiedImageError as error:  # which would name a place in memory where there is no path
        raise ValueError(f"`images`: {_describe(source)} cannot be read: it is no image that PIL knows") from error
    except Exception as error:
        raise ValueError(f"`images`: {_describe(source)} cannot be read: {error}") from error


def _describe(source: str | Path | dict) -> str:
    name = source.get("path") if isinstance(source, dict) else str(source)
    return repr(name if name is None or len(name) <= 200 else name[:200] + "…")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")
