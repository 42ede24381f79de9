"""Turns the videos of a call of the processor into one tensor of frames with their times."""

from typing import Any

import torch

from .images import MAX_PIXELS
from .inputs import flatten_metadata, flatten_videos
from .videos import VideoFrames, load_rgb_frames


def load_videos(
    videos: Any, arguments: dict[str, Any], default: dict[str, float], samples_always: bool
) -> list[VideoFrames]:
    """Loads the chosen frames of each video.

    Args:
        videos: The processor's `videos`.
        arguments (`dict`): The processor's arguments for videos.
        default (`dict`): `num_frames` or `fps`, if the call gives neither.
        samples_always (`bool`):
            Whether `do_sample_frames=False` is ignored. vLLM takes many frames of each video, and forbids to choose
            among them.

    Raises:
        ValueError: If an argument is out of range, or a video cannot be read.
    """
    videos, metadata = flatten_videos(videos), flatten_metadata(arguments.get("video_metadata"))
    if metadata and len(metadata) != len(videos):
        raise ValueError(f"`video_metadata` has {len(metadata)} entries for {len(videos)} videos.")
    frames = {name: arguments[name] for name in ("num_frames", "fps") if arguments.get(name) is not None}
    if not frames and (samples_always or arguments.get("do_sample_frames") is not False):
        frames = default
    settings = {
        **frames,
        "sampling": arguments.get("frame_sampling") or "uniform",
        "max_pixels": arguments.get("max_pixels") or MAX_PIXELS,
    }
    metadata = metadata or [None] * len(videos)
    return [load_rgb_frames(video, **settings, metadata=row) for video, row in zip(videos, metadata, strict=True)]


def stack_videos(pixels: torch.Tensor, times: list[list[float]]) -> dict[str, torch.Tensor]:
    """Puts the frames of videos into one tensor. Short videos are padded with zeros.

    Args:
        pixels (`torch.Tensor` of shape `(frames of all videos, channels, height, width)`): The prepared frames.
        times (`list[list[float]]`): The seconds of each frame of each video, counted from anywhere.

    Returns:
        `pixel_values_videos`, `frame_times`, and a `frame_mask` if there is padding, as the processor returns them.
    """
    lengths = [len(row) for row in times]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (videos, frames)
    padded = pixels.new_zeros(*mask.shape, *pixels.shape[1:])  # (videos, frames, channels, height, width)
    padded[mask] = pixels
    since_first = torch.zeros(mask.shape)  # (videos, frames)
    # Subtracted in float64: a camera may count from 1970.
    since_first[mask] = torch.tensor([time - row[0] for row in times for time in row])
    data = {"pixel_values_videos": padded, "frame_times": since_first}
    return data if mask.all() else {**data, "frame_mask": mask}
