"""Reads images and videos that visitors of a page upload, within limits on size, pixels, frames and time."""

import io
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import av
from PIL import Image

from processing_evlgen.images import MAX_ASPECT_RATIO, load_rgb_image
from processing_evlgen.videos import (
    MAX_FRAMES,
    FrameChoice,
    TimedFrame,
    TooFewFramesError,
    VideoFrames,
    check_end,
    is_shown,
    iterate_animated_image,
    iterate_container,
    to_rgb_image,
)

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # PIL knows more, and runs programs for some
ANIMATED = (".png", ".webp", ".gif")  # several images in a TIFF or a JPEG are no video
# FFmpeg's names. Without a name FFmpeg guesses, and would also open a playlist of other files.
VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".avi": "avi"}
VIDEOS |= {".mpg": "mpeg", ".mpeg": "mpeg"}

# A file of a few KB can hold images that fill the memory, so the size of a file is no limit. In millions of pixels:
IMAGE_MEGAPIXELS = 64
FRAME_MEGAPIXELS = 16  # of one frame, enough for 4K
ANIMATION_MEGAPIXELS = 500  # of all frames of an animated GIF, PNG or WebP: 500 frames of 1000 x 1000
VIDEO_MEGAPIXELS = 20_000  # of all frames of a video: 5 minutes of full HD
KEPT_MEGAPIXELS = 4  # larger frames are shrunk as soon as they are decoded
KEPT_MEGAPIXELS_OF_MANY = 0.25  # of each of more than 16 frames
FRAMES = 20_000
# For reading a file. PIL needs a minute for a GIF with 1 MB of comments, or for a PNG of a million empty chunks.
IMAGE_SECONDS, VIDEO_SECONDS = 10.0, 60.0


class RefusedError(ValueError):
    """A file exceeds a limit, or has no pictures. The message is the predicate of a sentence about the file."""


def read_file(path: str | Path, num_frames: int, fps: float | None = None) -> tuple[str, list[Image.Image]]:
    """Reads an uploaded file: returns `"images"` and the image, or `"videos"` and [`VideoFrames`] of a video.

    These are `num_frames` frames, or `fps` frames of each second. Gradio has limited the size of the file.

    A ValueError names a file that is missing, damaged, of another kind, or over a limit, without the server's folder.
    Pixels and frames are checked before any are decoded.
    """
    choice = FrameChoice(num_frames) if fps is None else FrameChoice(fps=fps)
    path = Path(path)
    name, suffix = repr(path.name), path.suffix.lower()
    if suffix not in (*IMAGES, *VIDEOS):
        images, videos = ", ".join(IMAGES), ", ".join(VIDEOS)
        raise ValueError(f"The file {name} is neither an image ({images}) nor a video ({videos}).")
    if not path.is_file():
        raise ValueError(f"The file {name} is no longer on the server. Upload it again.")
    try:
        if suffix in VIDEOS:
            return "videos", _read_video(path, choice)
        return _read_image(path, choice)
    except Image.DecompressionBombError as error:  # PIL's own limit is 179 million pixels
        raise ValueError(f"The file {name} has over {IMAGE_MEGAPIXELS} million pixels, more than are read.") from error
    except RefusedError as error:
        raise ValueError(f"The file {name} {error}.") from error
    except Exception as error:  # PIL and FFmpeg raise many kinds, with the server's own path in the message
        raise ValueError(f"The file {name} cannot be read; it is damaged, or not what its name says.") from error


def _read_video(path: Path, choice: FrameChoice) -> VideoFrames:
    """Chosen frames of a video."""
    format, deadline = VIDEOS[path.suffix.lower()], time.monotonic() + VIDEO_SECONDS
    with av.open(str(path), format=format) as container:
        if not container.streams.video:
            raise RefusedError("has no pictures, but sound or other data")
        stream = container.streams.video[0]
        # A packet holds a frame. Packets are counted, since the number in the file's head may be wrong.
        packets, shown = [], 0  # the seconds and the duration of each
        for packet in islice(container.demux(stream), FRAMES + 1):
            stamp, unit = packet.dts if packet.pts is None else packet.pts, packet.time_base or 0
            packets += [(float((stamp or 0) * unit), float((packet.duration or 0) * unit))] if packet.size else []
            shown += is_shown(packet)
        _check_sizes(len(packets), (stream.width, stream.height), FRAME_MEGAPIXELS, VIDEO_MEGAPIXELS)
        if packets:
            (first, _), (last, duration) = min(packets), max(packets)
            check_end(container, stream, len(packets), (first, last), duration)
    with av.open(str(path), format=format) as container:
        stream = container.streams.video[0]
        # Frames may be larger than the file's head says.
        stream.codec_context.options = {"max_pixels": str(FRAME_MEGAPIXELS * 1_000_000)}
        timed = iterate_container(container, stream)
        return _choose_frames(timed, shown, choice, VIDEO_MEGAPIXELS, deadline)


def _read_image(path: Path, choice: FrameChoice) -> tuple[str, list[Image.Image]]:
    """`"images"` and the image, or `"videos"` and chosen frames of an animation."""
    deadline = time.monotonic() + IMAGE_SECONDS
    with _TimedFile(path, deadline) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
        count = _count_frames(path, image) if path.suffix.lower() in ANIMATED else 1
        if count == 1:
            _check_sizes(count, image.size, IMAGE_MEGAPIXELS, IMAGE_MEGAPIXELS)
            image.load()  # here, since `load_rgb_image` would call a file that is too slow a damaged one
            return "images", [load_rgb_image(image)]
        _check_sizes(count, image.size, FRAME_MEGAPIXELS, ANIMATION_MEGAPIXELS)
        timed = iterate_animated_image(image)
        return "videos", _choose_frames(timed, count, choice, ANIMATION_MEGAPIXELS, deadline)


class _TimedFile(io.BufferedReader):
    """A file that cannot be read after a deadline."""

    def __init__(self, path: Path, deadline: float):
        super().__init__(io.FileIO(path))
        self.deadline = deadline

    def read(self, size: int | None = -1) -> bytes:
        _check_time(self.deadline)
        return super().read(size)


def _count_frames(path: Path, image: Image.Image) -> int:
    if image.format != "GIF":
        return getattr(image, "n_frames", 1)  # from the file's head
    with av.open(str(path), format="gif") as container:  # PIL takes 10 s for 200,000 frames, FFmpeg 0.1 s
        return container.streams.video[0].frames


def _check_sizes(count: int, size: tuple[int, int], frame_megapixels: int, megapixels: int) -> None:
    """Refuses `count` frames of this width and height."""
    pixels = size[0] * size[1]
    if pixels > 1e6 * frame_megapixels:
        what = "pixels" if count == 1 else "pixels in a frame"
        raise RefusedError(f"has over {frame_megapixels} million {what}, more than are read")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise RefusedError(
            f"is too thin: {size[0]} x {size[1]} pixels, a side over {MAX_ASPECT_RATIO} times the other"
        )
    most = min(FRAMES, int(1e6 * megapixels / max(1, pixels)))
    if count > most:
        raise RefusedError(f"is too long: at most {most} frames of this size are read")


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RefusedError("takes too long to read")


def _choose_frames(
    timed: Iterable[TimedFrame],
    total: int,
    choice: FrameChoice,
    megapixels: int,
    deadline: float,
) -> VideoFrames:
    """Takes chosen frames while they are decoded, and decodes none after the last one of these."""
    frames = []
    kept = KEPT_MEGAPIXELS if (choice.num_frames or MAX_FRAMES) <= 16 else KEPT_MEGAPIXELS_OF_MANY
    try:
        for frame, seconds in choice.select(_checked(timed, megapixels, deadline), total):
            image = to_rgb_image(frame)
            factor = math.ceil(math.sqrt(image.width * image.height / (1e6 * kept)))
            frames.append((image.reduce(factor), seconds))
    except TooFewFramesError:  # packets without a frame were counted
        pass
    except ValueError as error:
        if len(frames) < MAX_FRAMES:
            raise
        raise RefusedError(f"is too long: at most {MAX_FRAMES} frames are taken") from error
    return VideoFrames(*zip(*frames, strict=True))


def _checked(timed: Iterable[TimedFrame], megapixels: int, deadline: float) -> Iterator[TimedFrame]:
    """Yields frames while they are within the limits."""
    pixels = 0
    for frame, seconds, duration in timed:
        _check_time(deadline)
        pixels += frame.width * frame.height  # which may change from frame to frame
        if pixels > 1e6 * megapixels:
            raise RefusedError(f"has over {megapixels} million pixels in all frames, more than are read")
        yield frame, seconds, duration
