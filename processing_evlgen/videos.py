"""Reads a few RGB frames of videos: files, URLs, arrays, lists of frames."""

import importlib
import random
import tempfile
from numbers import Integral
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils import is_av_available
from transformers.video_utils import load_video

from .images import MAX_PIXELS, check_regular_file, check_size, download, is_url, load_rgb_image

FRAME_SAMPLINGS = ("uniform", "headtail")
_ANIMATED_IMAGES = (".webp", ".gif", ".png", ".apng")  # FFmpeg does not read animated WebP


def sample_frames(total: int, num_frames: int, sampling: str = "uniform") -> list[int]:
    """Chooses frames of a video, as the original does (lavis/datasets/data_utils.py, `load_video`).

    Args:
        total (`int`): Number of frames of the video, at least 1.
        num_frames (`int`): Number of frames to choose, at least 1. A shorter video gives all its frames.
        sampling (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"` takes frames at equal distances from the first one on. `"headtail"` draws half of them from
            each half of the video, with Python's `random`.

    Returns:
        `list[int]`: `min(num_frames, total)` indices in ascending order.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not isinstance(num_frames, Integral):
        raise ValueError(f"`num_frames` must be an integer, but is {num_frames!r}.")
    if total < 1 or num_frames < 1:
        raise ValueError(f"`total` and `num_frames` must be at least 1, but are {total} and {num_frames}.")
    count = min(num_frames, total)
    if sampling == "uniform":
        return [index * total // count for index in range(count)]
    if sampling == "headtail":
        half = total // 2
        head = random.sample(range(half), min(count // 2, half))
        tail = random.sample(range(half, total), count - len(head))
        return sorted(head + tail)
    raise ValueError(f"`frame_sampling` must be one of {', '.join(FRAME_SAMPLINGS)}, but is {sampling!r}.")


def load_rgb_frames(
    source: Any, num_frames: int, sampling: str = "uniform", max_pixels: int = MAX_PIXELS
) -> list[Any]:
    """Reads a few frames of a video, upright and in RGB.

    Args:
        source (`str`, `pathlib.Path`, `dict`, `list` or array):
            A file or URL that PyAV reads (mp4, webm, avi …) or an animated WebP, GIF or PNG. Or a list of frames,
            each of a type that [`load_rgb_image`] takes. Or a row of a `datasets` video column
            (`{"bytes": ..., "path": ...}`). Or an array of shape `(frames, height, width, 3)` or
            `(frames, 3, height, width)`.
        num_frames, sampling: As in [`sample_frames`].
        max_pixels (`int`, *optional*, defaults to 64,000,000): Largest width times height of a frame that is decoded.

    Returns:
        `list`: `PIL.Image.Image` objects in mode RGB, or arrays where arrays were given.

    Raises:
        ValueError: If the video cannot be read, has no frames or too large ones; the message names it.
        TypeError: If `source` is nothing of the above.
        ImportError: If a file needs PyAV, which is not installed.
    """
    if isinstance(source, dict):
        return _load_row(source, num_frames, sampling, max_pixels)
    if isinstance(source, str | Path):
        name = str(source)
        try:
            return _read_file(name, num_frames, sampling, max_pixels)
        except ImportError:
            raise
        except Exception as error:  # FFmpeg and PIL raise errors of many types for broken files
            raise ValueError(f"`videos`: {name!r} cannot be read: {error}") from error
    if not hasattr(source, "__len__"):
        raise TypeError(
            f"`videos` must hold files, URLs, arrays or lists of frames, but holds {type(source).__name__}."
        )
    if len(source) == 0:
        raise ValueError("`videos` holds a video without frames.")
    frames = [source[index] for index in sample_frames(len(source), num_frames, sampling)]
    try:
        return [load_rgb_image(frame, max_pixels=max_pixels) for frame in frames]
    except ValueError as error:
        raise ValueError(str(error).replace("`images`", "`videos`", 1)) from error


def _load_row(row: dict[str, Any], num_frames: int, sampling: str, max_pixels: int) -> list[Any]:
    if row.get("bytes") is None:
        return load_rgb_frames(row["path"], num_frames, sampling, max_pixels)
    name = Path(row.get("path") or "video")
    with tempfile.TemporaryDirectory() as folder:  # transformers' `load_video` reads files only
        path = Path(folder) / name.name
        path.write_bytes(row["bytes"])
        try:
            return load_rgb_frames(path, num_frames, sampling, max_pixels)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), str(name))) from error


def _read_file(name: str, num_frames: int, sampling: str, max_pixels: int) -> list[Image.Image]:
    if not is_url(name):
        check_regular_file(name)
    if Path(name.partition("?")[0]).suffix.lower() in _ANIMATED_IMAGES:
        return _read_animated_image(name, num_frames, sampling, max_pixels)
    if not is_av_available():
        raise ImportError('Reading videos needs PyAV. Install it with: pip install "av>=18.1"')
    if not is_url(name) and not Path(name).exists():
        raise FileNotFoundError("there is no such file")

    def choose(metadata: Any, **kwargs: Any) -> list[int]:
        check_size(metadata.width, metadata.height, max_pixels)
        # Many containers (WebM, MKV, streams) do not state their number of frames.
        return sample_frames(metadata.total_num_frames or _count_frames(name), num_frames, sampling)

    frames, _ = load_video(name, backend="pyav", sample_indices_fn=choose)
    return [Image.fromarray(frame) for frame in frames]


def _count_frames(name: str) -> int:
    # Not a plain import: the Hub's loader would require PyAV of all users of a checkpoint.
    av = importlib.import_module("av")
    with av.open(name) as container:
        return sum(1 for _ in container.decode(video=0))


def _read_animated_image(name: str, num_frames: int, sampling: str, max_pixels: int) -> list[Image.Image]:
    frames = []
    with Image.open(download(name) if is_url(name) else name) as image:
        check_size(image.width, image.height, max_pixels)
        for index in sample_frames(getattr(image, "n_frames", 1), num_frames, sampling):
            image.seek(index)
            frames.append(load_rgb_image(image.copy()))  # the next `seek` overwrites the pixels
    return frames
