"""Reads RGB frames of videos one after the other: files, URLs, bytes, arrays, lists of frames.

transformers' own reader is not used. It needs torchcodec, and reads whole videos into memory. It does not notice files
that end early, animated images, and how a phone was held.
"""

import importlib
import math
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.utils import is_av_available

from .images import MAX_PIXELS, check_size, describe, load_rgb_image, open_file

MAX_FRAMES = 512  # of a video that is held in memory; a stream may have any number
_DOWNLOAD_SECONDS = 600.0
# FFmpeg's names. Of those that are missing here, playlists and patterns of names would read other files.
_CONTAINERS = "asf,avi,dv,flv,h264,hevc,ivf,jpeg_pipe,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg"
_CONTAINERS += ",rm,wtv,yuv4mpegpipe"
_ROUNDING = 0.001  # seconds. WebM and MKV round times to milliseconds

# A frame, its seconds, and for how many seconds it is shown; 0 if the file does not state it.
TimedFrame = tuple[Any, float, float]


class TooFewFramesError(ValueError):
    """A video has fewer frames than were counted."""


class VideoFrames(list):
    """Frames of a video, and `times`, the seconds of each as the container states them."""

    def __init__(self, frames: Iterable[Any], times: Iterable[float]):
        super().__init__(frames)
        self.times = list(times)


def sample_frames(total: int, num_frames: int, sampling: str = "uniform") -> list[int]:
    """Chooses frames of a video, as the original does (lavis/datasets/data_utils.py, `load_video`).

    Returns `min(num_frames, total)` indices in ascending order. `"uniform"` takes frames at equal distances from the
    first one on. `"headtail"` draws half of them from each half of the video, with Python's `random`. An argument out
    of range raises a ValueError.
    """
    if not isinstance(num_frames, Integral) or isinstance(num_frames, bool) or num_frames < 1:
        raise ValueError(f"`num_frames` must be an integer of 1 or more, but is {num_frames!r}.")
    count = min(num_frames, total)
    if sampling == "uniform":
        return [index * total // count for index in range(count)]
    if sampling == "headtail":
        half = total // 2
        head = random.sample(range(half), min(count // 2, half))
        tail = random.sample(range(half, total), count - len(head))
        return sorted(head + tail)
    raise ValueError(f"`frame_sampling` must be one of uniform, headtail, but is {sampling!r}.")


def _is_rate(fps: Any) -> bool:
    return isinstance(fps, Real) and not isinstance(fps, bool) and 0 < fps < math.inf


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are read. A number out of range raises a ValueError, as do `num_frames` with `fps`.

    Args:
        num_frames (`int`, *optional*): Number of frames, 1 to 512. By default all of them, at most 512.
        sampling (`str`, *optional*, defaults to `"uniform"`): As in [`sample_frames`], for a `num_frames`.
        fps (`float`, *optional*):
            Frames for each second, instead of a number: those on screen at the first one, and at each multiple of
            `1 / fps` seconds after it. A frame is taken once, for however long it stays.
        max_frames (`int`, *optional*, defaults to 512): Largest number of frames. None allows any.
    """

    num_frames: int | None = None
    sampling: str = "uniform"
    fps: float | None = None
    max_frames: int | None = MAX_FRAMES

    def __post_init__(self):
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(f"Only one of `num_frames` and `fps` can be given, not {self.num_frames} and {self.fps}.")
        if self.fps is not None and not _is_rate(self.fps):
            raise ValueError(f"`fps` must be a number above 0, but is {self.fps!r}.")
        sample_frames(1, 1 if self.num_frames is None else self.num_frames, self.sampling)  # raises out of range
        if (self.num_frames or 0) > (self.max_frames or math.inf):
            raise ValueError(f"`num_frames` must be at most {self.max_frames}, but is {self.num_frames}.")

    def select(self, frames: Iterable[TimedFrame], total: int | None) -> Iterator[tuple[Any, float]]:
        """Yields the chosen ones of all `frames`, each with its seconds.

        Raises a ValueError if there are none or too many. Raises a TooFewFramesError if there are fewer than `total`,
        which is needed for a `num_frames` alone.
        """
        if self.num_frames is not None and total != 0:
            frames = _at_indices(frames, sample_frames(total, self.num_frames, self.sampling), total)
        elif self.fps is not None:
            frames = _at_ticks(frames, self.fps)
        count = 0
        for count, (frame, time, _) in enumerate(frames, start=1):
            if count > (self.max_frames or math.inf):
                raise ValueError(f"it has more than {self.max_frames} frames. Give a `num_frames`, or a lower `fps`")
            yield frame, time
        if count == 0:
            raise ValueError("it has no frames")


def _at_indices(frames: Iterable[TimedFrame], chosen: list[int], total: int) -> Iterator[TimedFrame]:
    count = 0
    for count, frame in enumerate(frames, start=1):
        if count - 1 in chosen:
            yield frame
        if count > chosen[-1]:
            return
    raise TooFewFramesError(f"it ends after {count} of its {total} frames")


def _at_ticks(frames: Iterable[TimedFrame], fps: float) -> Iterator[TimedFrame]:
    """Yields the frames that are on screen at a multiple of `1 / fps` seconds after the first one."""
    start, held, index = 0.0, None, -1

    def next_tick(time: float) -> int:
        return math.ceil((time - start - min(_ROUNDING, 0.1 / fps)) * fps)

    for index, frame in enumerate(frames):
        if index == 0:
            start = frame[1]
        elif next_tick(held[1]) < next_tick(frame[1]):  # there is a tick before the next frame replaces it
            yield held
        held = frame
    if held is not None:
        _, time, duration = held
        duration = duration or ((time - start) / index if index else 1 / fps)
        if index == 0 or next_tick(time) < next_tick(time + duration):
            yield held


def load_rgb_frames(
    source: Any,
    num_frames: int | None = None,
    sampling: str = "uniform",
    max_pixels: int = MAX_PIXELS,
    fps: float | None = None,
    metadata: Any = None,
) -> VideoFrames:
    """Reads frames of a video, upright and in RGB.

    Args:
        source (`str`, `pathlib.Path`, `dict`, `list` or array):
            A file or URL that PyAV reads (mp4, webm, avi …) or an animated WebP, GIF or PNG; a row of a `datasets`
            video column (`{"bytes": ..., "path": ...}`); a list of frames, each of a type that [`load_rgb_image`]
            takes; or an array of shape `(frames, height, width, 3)` or `(frames, 3, height, width)`.
        num_frames, sampling, fps: As in [`FrameChoice`].
        max_pixels (`int`, *optional*, defaults to 64,000,000): Largest width times height of a frame that is decoded.
        metadata (`VideoMetadata` or `dict`, *optional*):
            For lists and arrays: their `fps`, and ascending `frames_indices` if they are some of a longer video. By
            default they have the `fps` that is requested, or else one frame a second.

    Returns:
        [`VideoFrames`] with `PIL.Image.Image` objects in mode RGB, or with arrays where arrays were given.

    Raises:
        ValueError, TypeError: If the video cannot be read, ends early, or has no frames or too large ones.
        ImportError: If a file needs PyAV, which is not installed.
    """
    frames = iterate_rgb_frames(source, FrameChoice(num_frames, sampling, fps), max_pixels, metadata)
    return VideoFrames(*zip(*frames, strict=True))


def iterate_rgb_frames(
    source: Any, choice: FrameChoice, max_pixels: int = MAX_PIXELS, metadata: Any = None
) -> Iterator[tuple[Any, float]]:
    """Reads a video as [`load_rgb_frames`] does, frame by frame. Yields each one with its seconds."""
    is_row = isinstance(source, dict) and (source.get("bytes") is not None or source.get("path") is not None)
    if not is_row and not isinstance(source, str | Path):
        yield from _iterate_list(source, choice, max_pixels, metadata)
        return
    try:
        file = open_file(source, _DOWNLOAD_SECONDS)
        with _open_frames(file, max_pixels, needs_total=choice.num_frames is not None) as (frames, total):
            for frame, time in choice.select(frames, total):
                yield to_rgb_image(frame), time
    except ImportError:
        raise
    except Exception as error:  # FFmpeg and PIL raise errors of many types for broken files
        raise ValueError(f"`videos`: {describe(source)} cannot be read: {error}") from error


def _iterate_list(source: Any, choice: FrameChoice, max_pixels: int, metadata: Any) -> Iterator[tuple[Any, float]]:
    if source is None or isinstance(source, dict):  # a row without a video
        raise ValueError("`videos`: None is no video.")
    if not hasattr(source, "__len__"):
        name = type(source).__name__
        raise TypeError(f"`videos` must hold files, URLs, arrays or lists of frames, but holds {name}.")
    if len(source) == 0:
        raise ValueError("`videos` holds a video without frames.")
    times = _times_of_list(source, choice, metadata)
    try:
        for frame, time in choice.select(zip(source, times, [0.0] * len(source), strict=True), len(source)):
            yield load_rgb_image(frame, max_pixels=max_pixels), time
    except ValueError as error:
        message = str(error).replace("`images`", "`videos`", 1)
        raise ValueError(message if message != str(error) else f"`videos` holds a list of frames: {error}") from error


def _times_of_list(source: Any, choice: FrameChoice, metadata: Any) -> list[float]:
    if isinstance(source, VideoFrames):
        return source.times
    rate, indices = choice.fps, np.arange(len(source))
    if metadata:
        rate, given = metadata.get("fps"), metadata.get("frames_indices")
        indices = indices if given is None else np.asarray(given)
    if rate and not _is_rate(rate):  # readers of videos give 0 if they do not know it
        raise ValueError(f"`video_metadata` must have an `fps` above 0, but has {rate!r}.")
    is_number = indices.shape == (len(source),) and indices.dtype.kind in "iuf"
    if not is_number or not (indices[1:] >= indices[:-1]).all():
        wanted = f"{len(source)} ascending numbers, one for each frame"
        raise ValueError(f"`frames_indices` of `video_metadata` must be {wanted}, but are {str(given)[:200]}.")
    return (indices / (rate or 1.0)).tolist()


@contextmanager
def _open_frames(
    file: str | BytesIO, max_pixels: int, needs_total: bool
) -> Iterator[tuple[Iterator[TimedFrame], int | None]]:
    """Opens a video. Gives its frames, in a form that [`to_rgb_image`] reads, and their number if it is needed."""
    with nullcontext(file) if isinstance(file, BytesIO) else open(file, "rb") as content:
        start = content.read(12)
        content.seek(0)
    # FFmpeg does not read animated WebP.
    if start[8:] == b"WEBP" or start.startswith((b"GIF8", b"\x89PNG")):
        with Image.open(file) as image:
            check_size(image.width, image.height, max_pixels)
            yield iterate_animated_image(image), getattr(image, "n_frames", 1)
        return
    if not is_av_available():
        raise ImportError('Reading videos needs PyAV. Install it with: pip install "av>=18.1"')
    total = _count_frames(file, max_pixels) if needs_total else None
    with _open_stream(file, max_pixels) as (container, stream):
        yield iterate_container(container, stream), total


@contextmanager
def _open_stream(file: str | BytesIO, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """Opens a file with PyAV. Gives the container and its stream of images."""
    # Not a plain import: the Hub's loader would require PyAV of all users of a checkpoint.
    av = importlib.import_module("av")
    if isinstance(file, BytesIO):
        file.seek(0)
    try:
        container = av.open(file, options={"format_whitelist": _CONTAINERS})
    except av.error.ArgumentError as error:  # FFmpeg's own message has a number alone
        raise ValueError(f"it is no video, or of none of the kinds {_CONTAINERS.replace(',', ', ')}") from error
    with container:
        if not container.streams.video:
            raise ValueError("it has no pictures, but sound or other data")
        stream = container.streams.video[0]
        check_size(stream.width, stream.height, max_pixels)
        yield container, stream


def _count_frames(file: str | BytesIO, max_pixels: int) -> int:
    with _open_stream(file, max_pixels) as (container, stream):
        # The stated number also counts packets that are empty, or that an editor has hidden. Then only decoding helps,
        # as with WebM, MKV and streams, where no number is stated.
        if stream.frames and stream.frames == sum(is_shown(packet) for packet in container.demux(stream)):
            return stream.frames
    with _open_stream(file, max_pixels) as (container, stream):
        return sum(1 for _ in iterate_container(container, stream))


def is_shown(packet: Any) -> bool:
    """Whether a packet of PyAV holds a frame that players show."""
    return packet.size > 0 and not packet.is_discard


def iterate_container(container: Any, stream: Any) -> Iterator[TimedFrame]:
    """Decodes the frames of PyAV's stream. Raises a ValueError at its end, if there should be more."""
    rate, first, count, packets = float(stream.average_rate or 1), 0.0, 0, 0
    for packet in container.demux(stream):
        packets += packet.size > 0
        for frame in packet.decode():
            time = count / rate if frame.time is None else frame.time
            first, count = time if count == 0 else first, count + 1
            duration = float((frame.duration or 0) * (frame.time_base or 0))
            yield frame, time, duration
    if count:
        check_end(container, stream, packets, (first, time), duration)


def check_end(container: Any, stream: Any, packets: int, times: tuple[float, float], duration: float) -> None:
    """Raises a ValueError if the last frame is well before the duration that PyAV's stream states.

    `times` are the seconds of the first and the last frame. The last is shown for `duration` seconds; 0 if unstated.
    """
    # The last frame may stand still for long. So a video is whole if all packets are there, or if their number is not
    # stated and the last frame has no duration. The duration of an ASF file is that of its sound, too.
    if container.format.name == "asf" or not (packets < 0.9 * stream.frames if stream.frames else duration):
        return
    if stream.frames >= 2**30:  # the placeholder of an AVI that was written to a pipe
        return
    distance = (times[1] - times[0]) / (packets - 1) if packets > 1 else duration  # between frames
    end = times[1] - min(times[0], 0.0) + max(distance, duration)
    tag = re.match(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # of WebM and MKV
    if stream.duration:
        stated = float(stream.duration * stream.time_base)
    elif tag is not None:
        hours, minutes, seconds = map(float, tag.groups())
        stated = 3600 * hours + 60 * minutes + seconds
    else:  # the container's duration is no help, since its sound may be longer
        return
    # Healthy files are a few percent or a frame or two shorter than stated. So a cut in the last tenth goes unnoticed.
    if stated - end > max(0.1 * stated, 2 * distance):
        raise ValueError(f"it ends after {end:.1f} of its {stated:.1f} seconds")


def iterate_animated_image(image: Image.Image) -> Iterator[TimedFrame]:
    """Yields copies of an image at each of its frames."""
    time = 0.0
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()
        duration = (image.info.get("duration") or 100) / 1000  # browsers show frames without a duration for 100 ms
        yield image.copy(), time, duration  # the next `seek` overwrites the pixels
        time += duration


def to_rgb_image(frame: Any) -> Image.Image:
    """A frame of [`iterate_container`] or [`iterate_animated_image`] as an upright image in RGB."""
    if isinstance(frame, Image.Image):
        return load_rgb_image(frame)
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # Phones store videos as the sensor lies, and how players have to turn and mirror them.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    image = ImageOps.flip(image) if a * d < b * c else image
    return image.rotate(math.degrees(math.atan2(-b, a)), expand=True)
