"""Turns the videos of a call of the processor into one tensor of frames with their times."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from .images import MAX_PIXELS
from .inputs import flatten_metadata, flatten_videos
from .videos import FrameChoice, iterate_rgb_frames

FRAMES_AT_ONCE = 8  # that are prepared together; all decoded frames of a video may not fit into memory


def open_videos(
    videos: Any, arguments: dict[str, Any], default: dict[str, float], samples_always: bool
) -> list[Iterator[tuple[Any, float]]]:
    """Returns an iterator over the chosen frames of each video and their seconds. It reads the video as it goes.

    Args:
        videos: The processor's `videos`.
        arguments (`dict`): The processor's arguments for videos.
        default (`dict`): `num_frames` or `fps`, if the call gives neither.
        samples_always (`bool`):
            Whether `do_sample_frames=False` is ignored. vLLM takes many frames of each video, and forbids to choose
            among them.

    Raises:
        ValueError: If an argument is out of range.
    """
    videos, metadata = flatten_videos(videos), flatten_metadata(arguments.get("video_metadata"))
    if metadata and len(metadata) != len(videos):
        raise ValueError(f"`video_metadata` has {len(metadata)} entries for {len(videos)} videos.")
    if not videos:
        return []
    frames = {name: arguments[name] for name in ("num_frames", "fps") if arguments.get(name) is not None}
    if not frames and (samples_always or arguments.get("do_sample_frames") is not False):
        frames = default
    choice = FrameChoice(**frames, sampling=arguments.get("frame_sampling") or "uniform")
    max_pixels = arguments.get("max_pixels") or MAX_PIXELS
    metadata = metadata or [None] * len(videos)
    return [iterate_rgb_frames(video, choice, max_pixels, row) for video, row in zip(videos, metadata, strict=True)]


def prepare_videos(
    videos: list[Iterator[tuple[Any, float]]], prepare: Callable[[list[Any]], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Puts the frames of videos into one tensor. Short videos are padded with zeros.

    Args:
        videos (`list[Iterator]`): The frames of each video with their seconds, counted from anywhere.
        prepare (`Callable`): Turns frames into pixels, `(frames, channels, height, width)`.

    Returns:
        `pixel_values_videos`, `frame_times`, and a `frame_mask` if there is padding, as the processor returns them.

    Raises:
        ValueError: If a video cannot be read.
    """
    parts, times = [], []
    for video in videos:
        times.append([])
        while part := list(islice(video, FRAMES_AT_ONCE)):
            frames, seconds = zip(*part, strict=True)
            parts.append(prepare(list(frames)))
            times[-1] += seconds
    pixels = torch.cat(parts)  # (frames of all videos, channels, height, width)
    lengths = [len(row) for row in times]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (videos, frames)
    padded = pixels.new_zeros(*mask.shape, *pixels.shape[1:])  # (videos, frames, channels, height, width)
    padded[mask] = pixels
    since_first = torch.zeros(mask.shape)  # (videos, frames)
    # Subtracted in float64: a camera may count from 1970.
    since_first[mask] = torch.tensor([time - row[0] for row in times for time in row])
    data = {"pixel_values_videos": padded, "frame_times": since_first}
    return data if mask.all() else {**data, "frame_mask": mask}
