"""Images and videos that visitors of a page send: what is too large or of another kind is refused undecoded."""

import math
from itertools import islice
from pathlib import Path

import av
from PIL import Image

from processing_evlgen.images import load_rgb_image
from processing_evlgen.videos import load_rgb_frames

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # PIL knows more, and runs programs for some
ANIMATED = (".png", ".webp", ".gif")  # or videos; the pages of a TIFF or a JPEG are none
# As FFmpeg calls them; left to itself, it would take a playlist of other files as well.
VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".avi": "avi"}
VIDEOS |= {".mpg": "mpeg", ".mpeg": "mpeg"}
MEGAPIXELS = 64  # of an image or a frame; a small file may hold an image that no memory does
VIDEO_MEGAPIXELS = 20_000  # of all frames together, 5 minutes in full HD; they are decoded up to the last one wanted
MB = 2**20  # bytes, as Gradio counts them


def read_file(path: str | Path, num_frames: int, max_mb: float) -> tuple[str, list[Image.Image]]:
    """Reads what a visitor sent.

    Args:
        path: The file.
        num_frames: Frames to take of a video.
        max_mb: The largest file that is read, in MB of 2^20 bytes.

    Returns:
        `"images"` and the image, or `"videos"` and the frames of a video.

    Raises:
        ValueError: If the file is too large, of another kind or damaged, or it holds more pixels than are read, which
            is found out before any is decoded. The message leaves the server's folder out.
    """
    path = Path(path)
    name, suffix = repr(path.name), path.suffix.lower()
    if suffix not in (*IMAGES, *VIDEOS):
        kinds = f"an image ({', '.join(IMAGES)}) nor a video ({', '.join(VIDEOS)})"
        raise ValueError(f"The file {name} is neither {kinds}.")
    megabytes = path.stat().st_size / MB
    if megabytes > max_mb:
        raise ValueError(f"The file {name} has {megabytes:.1f} MB, but at most {max_mb:g} MB are read.")
    unreadable = f"The file {name} cannot be read; it is damaged, or not what its name says."
    try:
        frames, pixels = _measure(path)
    except Image.DecompressionBombError:  # PIL's own limit is over this one
        frames, pixels = 1, math.inf
    except Exception as error:  # what PIL and FFmpeg raise is of many kinds, and names the server's own path
        raise ValueError(unreadable) from error
    if pixels > 1e6 * MEGAPIXELS:
        raise ValueError(f"The file {name} has over {MEGAPIXELS} million pixels, more than are read.")
    if frames > _most_frames(pixels):
        raise ValueError(f"The video {name} is too long: at most {_most_frames(pixels)} frames of this size are read.")
    try:
        if path.suffix.lower() in VIDEOS or frames > 1:
            return "videos", load_rgb_frames(path, num_frames)
        return "images", [load_rgb_image(path)]
    except ValueError as error:
        raise ValueError(unreadable) from error


def _most_frames(pixels: int) -> int:
    return int(1e6 * VIDEO_MEGAPIXELS / max(1, pixels))


def _measure(path: Path) -> tuple[int, int]:
    """Number of frames and pixels of each, without decoding; of a video that is too long, enough frames to say so."""
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            frames = getattr(image, "n_frames", 1) if suffix in ANIMATED else 1
            return frames, image.width * image.height
    with av.open(str(path), format=VIDEOS[suffix]) as container:
        stream = container.streams.video[0]
        pixels = stream.width * stream.height
        # A packet holds a frame. They are counted, as the file's head may say anything.
        packets = islice(container.demux(stream), _most_frames(pixels) + 1)
        return sum(1 for packet in packets if packet.size), pixels
