"""Ways to pool the frames of a video to as many tokens as one image has, or fewer."""

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm

from common.demo.cache import prepare_once
from modeling_evlgen import video_merging
from modeling_evlgen.video_merging import add_frames, place_frames

from . import emoji_frames, ordered_clips
from .ordered_clips import Clip

PARTS = (9, 2, 2)  # in time, rows and columns: 36 means
BATCH, FRAMES_AT_ONCE = 32, 8  # videos, and frames of each

MEAN, PARTS_MEANS, MERGE, TIMELESS = "mean of frames", "means in 9 parts", "merge", "merge without times"


def pool_clips(method: str, split: str, clips: list[Clip], frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pools the videos of a split, or reads the result of an earlier call.

    Args:
        method (`str`): One of [`POOLINGS`], or "merge without times".
        split (`str`): The split's name.
        clips (`list[Clip]`): The videos of the split.
        frames (`torch.Tensor` of shape `(emoji, tones, frames, tokens, dim)`): Features of the split's frames.

    Returns:
        `features`, float16, `(videos, tokens, dim)`, and for merged videos `places`, `(videos, tokens, 3)`.
    """
    pooling = MERGE if method == TIMELESS else method
    # Other videos, or another way to merge, have other code.
    code = "".join(map(inspect.getsource, (emoji_frames, ordered_clips, video_merging, pool_clips)))
    digest = hashlib.sha256(f"{code}{frames.shape}".encode()).hexdigest()[:8]
    name = f"data/video-order-{pooling.replace(' ', '-')}-{split}-{digest}"
    folder = prepare_once(name, partial(_write, POOLINGS[pooling], clips, frames.flatten(0, 2)))
    pooled = load_file(folder / "videos.safetensors")
    if method == TIMELESS:
        pooled["places"][..., 0] = 0
    return pooled


@torch.no_grad()
def _write(pool: Callable, clips: list[Clip], frames: torch.Tensor, folder: Path) -> None:
    by_length = defaultdict(list)
    for index, clip in enumerate(clips):
        by_length[len(clip.frames)].append(index)
    batches = [
        indices[start : start + BATCH] for indices in by_length.values() for start in range(0, len(indices), BATCH)
    ]
    pooled: dict[str, torch.Tensor] = {}
    for indices in tqdm(batches, desc="Pooling", unit="batch"):
        chosen = torch.tensor([clips[index].frames for index in indices])  # (videos, length)
        for name, values in pool(frames, chosen).items():
            pooled.setdefault(name, torch.empty(len(clips), *values.shape[1:], dtype=values.dtype))[indices] = values
    folder.mkdir()
    save_file(pooled, folder / "videos.safetensors")


def pool_mean(frames: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean of all frames, `(videos, tokens, dim)`.

    Args:
        frames (`torch.Tensor` of shape `(frames, tokens, dim)`): Features of all frames.
        chosen (`torch.Tensor` of shape `(videos, length)`): The indices of each video's frames.
    """
    return {"features": torch.stack([frames[video].float().mean(dim=0) for video in chosen]).half()}


def pool_parts(frames: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means of parts of a video in time and space, `(videos, parts, dim)`. Arguments as in [`pool_mean`]."""
    side = round(frames.shape[1] ** 0.5)
    videos = []
    for video in chosen:
        grid = frames[video].float().unflatten(1, (side, side))  # (length, rows, columns, dim)
        videos.append(F.adaptive_avg_pool3d(grid.movedim(-1, 0), PARTS).flatten(1).T)  # (parts, dim)
    return {"features": torch.stack(videos).half()}


def pool_merge(frames: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Merges frames as a model with `video_mode="merge"` does, one a second. Arguments as in [`pool_mean`]."""
    pool, videos = None, torch.arange(len(chosen))
    for start in range(0, chosen.shape[1], FRAMES_AT_ONCE):
        part = chosen[:, start : start + FRAMES_AT_ONCE].T  # (frames at once, videos)
        times = torch.arange(start, start + len(part)).float().repeat_interleave(len(videos))
        placed = place_frames(frames[part.flatten()], times, class_token=False)
        pool = add_frames(pool, placed, [videos] * len(part), class_token=False)
    return {"features": pool.features.half(), "places": pool.places}


POOLINGS = {MEAN: pool_mean, PARTS_MEANS: pool_parts, MERGE: pool_merge}
METHODS = (MEAN, MERGE, PARTS_MEANS, TIMELESS)
