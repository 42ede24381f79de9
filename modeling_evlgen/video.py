"""Videos as the mean of their frames, and the contextualizer by which frames see each other (EVLGen, section 3.3)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .vision_tower import extract_vision_tokens, is_sharded

# Without a gradient, this many frames run through the tower, or through one part of it, at a time.
FRAMES_AT_ONCE = 32
# Scores of the temporal attention that are computed at a time: pairs of frames, times tokens.
SCORES_AT_ONCE = 2**20
# Frequencies of the time embedding in radians per second. Their periods are 0.8 seconds to 1.8 hours.
_FREQUENCIES = tuple(2.0**exponent for exponent in range(3, -11, -1))

# The parts of the two residual branches of a pre-norm transformer block, in order. Each part has several names, since
# towers differ in them.
_ATTENTION = (
    ("layer_norm1", "norm1", "layernorm_before"),
    ("self_attn", "attention", "attn"),
    ("layer_scale1", "ls1"),
    ("drop_path1", "drop_path"),
)
_FEED_FORWARD = (
    ("layer_norm2", "norm2", "layernorm_after"),
    ("mlp",),
    ("layer_scale2", "ls2"),
    ("drop_path2", "drop_path"),
)


class _Call(threading.local):
    """The videos whose frames run through a tower in this thread. [`frames_of_videos`] sets them.

    They cannot be arguments of the blocks: few towers pass further arguments on to them. A `ContextVar` would do as
    well, but `torch.compile` cannot trace it.
    """

    frames: tuple[int, torch.Tensor | None] | None = None  # frames of each video, and their mask


_call = _Call()


@contextmanager
def frames_of_videos(num_frames: int, frame_mask: torch.Tensor | None = None) -> Iterator[None]:
    """While this is open, the frames of a video attend to each other in blocks with a [`TemporalContextualizer`].

    It holds for this thread. The tower's batch is then `videos * num_frames` images. `frame_mask`, `(videos, frames)`,
    is False for frames that are padding.
    """
    # A mask of numbers would be added to the scores.
    before, _call.frames = _call.frames, (num_frames, None if frame_mask is None else frame_mask.bool())
    try:
        yield
    finally:
        _call.frames = before


class TimeEmbedding(nn.Module):
    """A learned function of the time in seconds. It starts at zero, and stays zero at the time 0.

    It is linear in `sin(w t)` and `cos(w t) - 1` for frequencies w from one radian in 17 minutes to 8 in a second.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 2 * len(_FREQUENCIES)))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """Embeds times of any shape, as `(*shape, dim)`."""
        phases = times.float().unsqueeze(-1) * times.new_tensor(_FREQUENCIES, dtype=torch.float32)
        waves = torch.cat([phases.sin(), phases.cos() - 1], dim=-1)  # (*shape, 2 * frequencies)
        return nn.functional.linear(waves.to(self.weight.dtype), self.weight)


class TemporalContextualizer(nn.Module):
    """Attention over the frames of a video, separately for each token position, in one block of a vision tower.

    Between the block's attention and its feed-forward, x becomes
    `x + alpha * softmax(query(x) key(x)ᵀ * scale) x`. The values are the tokens themselves, split into heads. There is
    no output projection. The scale is `hidden_size**-0.5`, from the whole width and not from a head's. `alpha` is a
    learned scalar that starts at zero. Source: `temporal_merge` of the original (yiren-jian/EVLGen).

    The block keeps its parts and their names. [`run_block`] replaces the block's own `forward`. `dim` is the width of
    the tokens, and `hidden_size` that of queries and keys, both multiples of `num_heads`. Learned `frame_positions`,
    0 for the first frame, are added to the tokens first.
    """

    def __init__(self, dim: int, hidden_size: int, num_heads: int, frame_positions: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.scaling = hidden_size**-0.5
        self.query = nn.Linear(dim, hidden_size)
        self.key = nn.Linear(dim, hidden_size)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.frame_positions = TimeEmbedding(dim) if frame_positions else None
        self._block: tuple[nn.Module, ...] = ()  # in a tuple, so that it does not become a submodule

    def forward(self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns what is added to the tokens `(videos, frames, tokens, dim)` of all frames, of their shape and dtype.

        `frame_mask`, `(videos, frames)`, is False for frames that are padding.
        """
        inputs = hidden_states.to(self.query.weight.dtype).transpose(1, 2)  # (videos, tokens, frames, dim)
        if self.frame_positions is not None:
            # Counted in integers, since bfloat16 has no 257.
            real = torch.ones_like(inputs[:, 0, :, 0], dtype=torch.bool) if frame_mask is None else frame_mask
            inputs = inputs + self.frame_positions(real.cumsum(dim=1).unsqueeze(1) - 1)
        heads = (*inputs.shape[:3], self.num_heads, -1)
        query = self.query(inputs).view(heads).transpose(2, 3)  # (videos, tokens, heads, frames, head_dim)
        key = self.key(inputs).view(heads).transpose(2, 3)
        value = inputs.reshape(heads).transpose(2, 3)  # (videos, tokens, heads, frames, dim / heads)
        mask = None if frame_mask is None else frame_mask[:, None, None, None, :]
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        context = context.permute(0, 3, 1, 2, 4).reshape(hidden_states.shape)  # (videos, frames, tokens, dim)
        return (self.alpha * context).to(hidden_states.dtype)

    def join(self, block: nn.Module) -> None:
        """Inserts the contextualizer into a pre-norm transformer block."""
        self._block = (block,)
        block.forward = self.run_block

    def run_block(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the block with the contextualizer between its two branches, on `(videos * frames, tokens, dim)`.

        Outside of [`frames_of_videos`] it runs the plain block. `args` and `kwargs` are for the block's attention.
        Without a gradient, only the tokens themselves take more memory for more frames.
        """
        (block,) = self._block
        if _call.frames is None:
            return type(block).forward(block, hidden_states, *args, **kwargs)
        run = partial(self._run_branches, *_call.frames, **kwargs)
        if getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled():
            # The backward pass calls `run` again: later, and on a GPU in another thread. So `run` holds the frames.
            return block._gradient_checkpointing_func(run, hidden_states, *args)
        return run(hidden_states, *args)

    def _run_branches(
        self, num_frames: int, frame_mask: torch.Tensor | None, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        (block,) = self._block
        whole = (
            hidden_states.numel() if is_sharded(block) else 0
        )  # or processes would call its modules unequally often
        frames_at_once = max(whole, FRAMES_AT_ONCE)
        attend = partial(_branch, block, _ATTENTION)
        hidden_states = _add_in_parts(lambda part: attend(part, *args, **kwargs), hidden_states, frames_at_once)
        video = hidden_states.unflatten(0, (-1, num_frames))  # (videos, frames, tokens, dim)
        # Token positions are independent of each other. The scores of all together would fill memory in long videos.
        tokens_at_once = max(1, whole, SCORES_AT_ONCE // num_frames**2)
        video = _add_in_parts(lambda part: self(part, frame_mask), video, tokens_at_once, dim=2, inplace=True)
        feed_forward = partial(_branch, block, _FEED_FORWARD)
        return _add_in_parts(feed_forward, video.flatten(0, 1), frames_at_once, inplace=True)


class TemporalTower(nn.ModuleList):
    """One [`TemporalContextualizer`], made with `arguments`, for each pre-norm transformer block of a vision tower.

    Raises a ValueError if the tower has no such blocks.
    """

    def __init__(self, vision_tower: PreTrainedModel, *arguments: Any):
        needed = (*_ATTENTION[:2], *_FEED_FORWARD[:2])  # a norm with an attention, and a norm with a feed-forward
        blocks = [block for block in vision_tower.modules() if None not in (_part(block, names) for names in needed)]
        if not blocks:
            tower = type(vision_tower).__name__
            raise ValueError(f"`temporal_contextualizer` must be False: {tower} has no pre-norm transformer blocks.")
        super().__init__(TemporalContextualizer(*arguments) for _ in blocks)
        for contextualizer, block in zip(self, blocks, strict=True):
            contextualizer.join(block)


def encode_images(
    vision_tower: PreTrainedModel, temporal: TemporalTower | None, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Runs a tower over `(images, channels, height, width)`. With a contextualizer, these are videos of one frame."""
    with nullcontext() if temporal is None else frames_of_videos(1):
        return extract_vision_tokens(vision_tower, pixel_values)


def encode_videos(
    vision_tower: PreTrainedModel,
    temporal: TemporalTower | None,
    pixel_values: torch.Tensor,
    frame_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a vision tower over frames, `(videos, frames, channels, height, width)`, and averages their tokens.

    `frame_mask`, `(videos, frames)`, is False for frames that are padding. Returns `(videos, tokens, dim)`.
    """
    videos, num_frames = pixel_values.shape[:2]
    if frame_mask is None:
        weight = torch.full((videos, num_frames), 1 / num_frames, device=pixel_values.device)
    else:
        frame_mask = frame_mask.bool()
        weight = frame_mask / frame_mask.sum(dim=1, keepdim=True)  # (videos, frames)
    if temporal is not None:
        with frames_of_videos(num_frames, frame_mask):
            return _weighted_mean(vision_tower, pixel_values, weight)
    # Frames that do not attend to each other can be encoded one after the other, which saves memory.
    whole = torch.is_grad_enabled() or is_sharded(vision_tower)
    at_once = num_frames if whole else max(1, FRAMES_AT_ONCE // videos)
    parts = zip(pixel_values.split(at_once, dim=1), weight.split(at_once, dim=1), strict=True)
    return sum(_weighted_mean(vision_tower, frames, part) for frames, part in parts)


def _weighted_mean(vision_tower: PreTrainedModel, frames: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    tokens = extract_vision_tokens(vision_tower, frames.flatten(0, 1)).unflatten(0, weight.shape)
    return torch.einsum("vf,vftd->vtd", weight.to(tokens), tokens)  # (videos, tokens, dim)


def _part(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(block, name) for name in names if isinstance(getattr(block, name, None), nn.Module)), None)


def _branch(
    block: nn.Module, parts: tuple[tuple[str, ...], ...], hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Runs one residual branch of a block, without the sum. `args` and `kwargs` go to its attention."""
    norm, middle, *ends = (_part(block, names) for names in parts)
    output = middle(norm(hidden_states), *args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output  # some return attention probabilities as well
    for end in ends:
        output = output if end is None else end(output)
    return output


def _add_in_parts(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, size: int, dim: int = 0, inplace: bool = False
) -> torch.Tensor:
    """Returns `x + function(x)`; without a gradient for `size` entries of `dim` at a time, over `x` if `inplace`."""
    if torch.is_grad_enabled() or x.shape[dim] <= size:
        return x + function(x)
    total = x if inplace else torch.empty_like(x)
    for part, target in zip(x.split(size, dim), total.split(size, dim), strict=True):
        target.copy_(part + function(part))
    return total
