"""Merges the frames of a video, one after the other, into as many tokens as one image has.

A pool holds these tokens. Each new frame is merged within itself first, and then with the pool. STTM measured this
order, space before time, far ahead of merging in both at once (arXiv 2507.07990).
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .soft_prompts import check_finite
from .token_merging import TokenMerging, keep_all
from .video import FRAMES_AT_ONCE
from .vision_tower import extract_vision_tokens, is_sharded

ROUNDS = 3  # of matching, within a frame and over time. Six keep no more, and take twice as long
# What the whole length of a video takes from the similarity of two tokens. Without it, something that comes, goes and
# comes again would become tokens of one time in the middle.
TIME_WEIGHT = 0.4

Frames = Iterable[torch.Tensor | tuple[torch.Tensor, float]]  # alone, or each with its time in seconds


class VideoTokens(NamedTuple):
    """Tokens that know where they are. Each is the mean of `size` tokens of the vision tower.

    Args:
        features (`torch.FloatTensor` of shape `(videos, tokens, dim)`): The tokens, the class token first, if any.
        places (`torch.FloatTensor` of shape `(videos, tokens, 3)`):
            Seconds since the first frame, row and column in the grid of patches. A class token has row and column 0.
        size (`torch.FloatTensor` of shape `(videos, tokens)`): The number of tokens merged into each.
    """

    features: torch.Tensor
    places: torch.Tensor
    size: torch.Tensor

    def merge(self, merging: TokenMerging) -> "VideoTokens":
        """Merges tokens to means in proportion to their sizes."""
        features, places = merging.merge(self.features, self.size), merging.merge(self.places, self.size)
        return VideoTokens(features, places, merging.sum_sizes(self.size))

    def join(self, others: "VideoTokens") -> "VideoTokens":
        """Puts other tokens of the same videos behind these."""
        return VideoTokens(*(torch.cat(pair, dim=1) for pair in zip(self, others, strict=True)))

    def drop(self, prefix: int) -> "VideoTokens":
        """The tokens without the first ones."""
        return VideoTokens(*(tensor[:, prefix:] for tensor in self))

    def take(self, videos: torch.Tensor | slice) -> "VideoTokens":
        """The tokens of some videos."""
        return VideoTokens(*(tensor[videos] for tensor in self))


def place_frames(features: torch.Tensor, times: torch.Tensor, class_token: bool) -> VideoTokens:
    """The tokens of frames with their places, before any merging.

    `features` are `(frames, tokens, dim)`. `times`, `(frames,)`, are seconds since the first frame.
    """
    num_patches = features.shape[1] - int(class_token)
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        reason = f"the vision tower gives {num_patches} patches"
        raise ValueError(f"Merged videos need frames with a square grid of patches, but {reason}.")
    patches = torch.cartesian_prod(*[torch.arange(float(side), device=features.device)] * 2).view(-1, 2)
    patches = F.pad(patches, (0, 0, int(class_token), 0))  # (tokens, 2)
    times = times.to(patches)[:, None, None].expand(-1, len(patches), 1)
    places = torch.cat([times, patches.expand(len(times), -1, -1)], dim=2)  # (frames, tokens, 3)
    # A running mean of many frames needs float32. In bfloat16, the 200th frame would be lost to rounding.
    return VideoTokens(features.float(), places, torch.ones_like(places[:, :, 0]))


@torch.no_grad()
def match_patches(tokens: VideoTokens, num_output_tokens: int, prefix: int = 0) -> TokenMerging:
    """Matches patches in rounds until `num_output_tokens` are left. Tokens keep their order.

    Two patches are as similar as their cosine, less `TIME_WEIGHT` times their distance in time as a share of the time
    so far. In each round, every patch is linked to the most similar one before it, and the strongest links are merged.
    So the most similar pair always is. [`bipartite_soft_matching`] would miss a patch and its copy in the next frame
    if both have an even or an odd index. With each frame, 7 % of the patches of a standing image would be merged with
    others. The first `prefix` tokens stay.
    """
    merging, times = keep_all(tokens.features), tokens.places[..., 0]
    span = (times.amax(dim=1) - times.amin(dim=1)).clamp(min=1e-6)  # (videos,)
    at_once = -(-(times.shape[1] - num_output_tokens) // ROUNDS)
    while merging.num_output_tokens > num_output_tokens:
        r = min(at_once, merging.num_output_tokens - num_output_tokens)
        matched = _link_patches(tokens, r, prefix, span)
        tokens, merging = tokens.merge(matched), merging.then(matched)
    return merging


def _link_patches(tokens: VideoTokens, r: int, prefix: int, span: torch.Tensor) -> TokenMerging:
    """One round, which removes `r` tokens. `span` is the time so far in seconds, `(videos,)`."""
    batch, num_tokens, _ = tokens.features.shape
    normed = F.normalize(tokens.features[:, prefix:], dim=-1)
    with torch.autocast(normed.device.type, enabled=False):  # in bfloat16, a copy is no more similar than a like one
        similarity = normed @ normed.transpose(1, 2)  # (batch, patches, patches)
    shares = tokens.places[:, prefix:, 0] / span[:, None]  # of the time so far
    distance = (shares[:, :, None] - shares[:, None]).abs()
    similarity = similarity - TIME_WEIGHT * distance
    earlier = torch.ones_like(similarity[0], dtype=torch.bool).tril(diagonal=-1)
    best, target = similarity.masked_fill(~earlier, -torch.inf).max(dim=-1)  # (batch, patches)
    sources = best.topk(r, dim=-1).indices
    root = torch.arange(num_tokens, device=span.device).repeat(batch, 1)
    root.scatter_(1, sources + prefix, target.gather(1, sources) + prefix)
    for _ in range(r.bit_length()):  # links form trees, and each tree becomes one token, where its first one is
        root = root.gather(1, root)
    is_root = torch.ones_like(root).scatter_(1, sources + prefix, 0)
    return TokenMerging((is_root.cumsum(dim=1) - 1).gather(1, root), num_tokens - r)


def merge_over_time(pool: VideoTokens, frame: VideoTokens, class_token: bool) -> tuple[VideoTokens, torch.Tensor]:
    """Merges one more frame into the pool, which keeps its number of tokens. Class tokens are averaged.

    Also returns the new index of each token of the pool, and then of the frame, `(videos, tokens of both)`.
    """
    prefix, num_tokens = int(class_token), pool.size.shape[1]
    matched = match_patches(pool.drop(prefix).join(frame.drop(prefix)), num_tokens - prefix)
    of_pool, of_frame = matched.output_index.split((num_tokens - prefix, frame.size.shape[1] - prefix), dim=1)
    index = torch.cat([F.pad(part + prefix, (prefix, 0)) for part in (of_pool, of_frame)], dim=1)
    return pool.join(frame).merge(TokenMerging(index, num_tokens)), index


def add_frames(
    pool: VideoTokens | None,
    frames: VideoTokens,
    steps: list[torch.Tensor],
    class_token: bool,
    indices: list[torch.Tensor] | None = None,
) -> VideoTokens:
    """Merges further frames into the pools of videos. Without pools, the first step has all videos.

    `frames` are the tokens of each frame; those of a step follow each other. For each step, `steps` holds the indices
    of the videos that have another frame. For each merge, `indices` gets the new index of each token of the pool, and
    then of the frame.
    """
    counts = [len(videos) for videos in steps]
    if pool is None:
        pool = frames.take(slice(counts[0]))
        frames, steps, counts = frames.take(slice(counts[0], None)), steps[1:], counts[1:]
        if not steps:
            return pool
    prefix, num_patches = int(class_token), frames.size.shape[1] - int(class_token)
    within = match_patches(frames, prefix + -(-num_patches // 2), prefix)  # to half of the patches of each frame
    parts = zip(*(tensor.split(counts) for tensor in (*frames.merge(within), within.output_index)), strict=True)
    for videos, (*part, of_frame) in zip(steps, parts, strict=True):
        merged, index = merge_over_time(pool.take(videos), VideoTokens(*part), class_token)
        if indices is not None:
            of_pool, of_merged = index.tensor_split([pool.size.shape[1]], dim=1)
            indices.append(torch.cat([of_pool, of_merged.gather(1, of_frame)], dim=1))
        videos = videos.to(pool.size.device)
        pool = VideoTokens(*(old.index_copy(0, videos, new) for old, new in zip(pool, merged, strict=True)))
    return pool


def merge_videos(
    vision_tower: PreTrainedModel,
    pixel_values: torch.Tensor,
    frame_mask: torch.Tensor | None,
    frame_times: torch.Tensor | None,
    class_token: bool,
    indices: list[torch.Tensor] | None = None,
) -> VideoTokens:
    """Encodes the frames of videos in parts, and merges them as they arrive, to the tokens of one image a video.

    The arguments are those of [`~EVLGenModel.get_video_features`], and `indices` as in [`add_frames`]. Padding frames
    are not encoded. Raises a ValueError if a time is not finite.
    """
    mask = torch.ones_like(pixel_values[:, :, 0, 0, 0], dtype=torch.bool) if frame_mask is None else frame_mask.bool()
    videos, frames = mask.nonzero(as_tuple=True)
    steps = (mask.cumsum(dim=1) - 1)[videos, frames]  # the frame's number in its video
    order = steps.argsort(stable=True)
    videos, frames, counts = videos[order], frames[order], steps.bincount().tolist()
    times = steps[order].float()
    if frame_times is not None:
        check_finite({"`frame_times`": frame_times})
        seconds = frame_times.to(mask.device)
        seconds = seconds - seconds.gather(1, mask.int().argmax(dim=1, keepdim=True))  # since the first frame
        times = seconds[videos, frames].float()
    pool, start = None, 0
    steps_at_once = len(counts) if is_sharded(vision_tower) else max(1, FRAMES_AT_ONCE // len(mask))
    for step in range(0, len(counts), steps_at_once):
        counts_at_once = counts[step : step + steps_at_once]
        part = slice(start, start := start + sum(counts_at_once))
        pixels = pixel_values[videos[part], frames[part]]  # (frames of this part, channels, height, width)
        placed = place_frames(extract_vision_tokens(vision_tower, pixels), times[part], class_token)
        pool = add_frames(pool, placed, list(videos[part].split(counts_at_once)), class_token, indices)
    return pool


def merge_stream(
    vision_tower: PreTrainedModel, frames: Frames, class_token: bool | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes one video whose frames arrive one after the other, as [`~EVLGenModel.encode_video`] takes them.

    Returns the features, `(1, tokens, dim)`, and the places of the tokens, `(1, tokens, 3)`. With a `class_token` of
    None, frames are averaged instead, and have no places.
    """
    pool, total, count = None, 0, 0
    for pixels, times in _read_in_parts(frames):
        # An offloaded tower is on the meta device until it runs. Then it takes the pixels to its device itself.
        device = pixels.device if vision_tower.device.type == "meta" else vision_tower.device
        pixels = pixels.to(device, vision_tower.dtype)
        tokens = extract_vision_tokens(vision_tower, pixels)  # (frames of the part, tokens, dim)
        if class_token is None:
            total, count = total + tokens.float().sum(dim=0, keepdim=True), count + len(tokens)
        else:
            steps = list(torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device))
            pool = add_frames(pool, place_frames(tokens, times, class_token), steps, class_token)
    return ((total / count).to(tokens), None) if class_token is None else (pool.features, pool.places)


def _read_in_parts(frames: Frames) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields frames, `(part, channels, height, width)`, and the seconds of each since the first one."""
    timed, start, shape = _with_seconds(frames), None, None
    while part := list(itertools.islice(timed, FRAMES_AT_ONCE)):
        pixels, times = zip(*part, strict=True)
        start, shape = (times[0], pixels[0].shape) if shape is None else (start, shape)
        wrong = next((frame.shape for frame in pixels if frame.ndim != 3 or frame.shape != shape), None)
        if wrong is not None:
            found = f"{tuple(wrong)} after {tuple(shape)}"
            raise ValueError(f"`frames` must be of one shape (channels, height, width), but yields {found}.")
        since_start = torch.tensor([time - start for time in times], dtype=torch.float32)
        check_finite({"`frames`: their times": since_start})
        yield torch.stack(pixels), since_start
    if shape is None:
        raise ValueError("`frames` must yield at least one frame, but yields none.")


def _with_seconds(frames: Frames) -> Iterator[tuple[torch.Tensor, float]]:
    timed, before = None, -math.inf
    for index, frame in enumerate(frames):
        is_timed = isinstance(frame, tuple) and len(frame) == 2
        pixels, time = frame if is_timed else (frame, index)
        if not torch.is_tensor(pixels):
            found = type(pixels).__name__
            raise TypeError(f"`frames` must yield tensors, alone or in pairs with their seconds, but yields {found}.")
        if timed not in (None, is_timed):
            raise TypeError(f"`frames` must yield a time with each frame or with none, but frame {index} differs.")
        timed = is_timed
        if not hasattr(time, "__float__") or isinstance(time, bool):
            raise TypeError(f"`frames` must yield times in seconds, but yields {time!r}.")
        if float(time) < before:
            raise ValueError(
                f"`frames` must yield frames in their order, but one of {time} s follows one of {before} s."
            )
        before = float(time)
        yield pixels, before
