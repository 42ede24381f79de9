"""The temporal contextualizer, which turns a frozen image tower into a video tower (EVLGen, section 3.3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .vision_tower import extract_vision_tokens

# Without a gradient, clips run through the tower in parts of about so many frames.
IMAGES_AT_ONCE = 32

# Pairs of frames, over all places, that the temporal attention looks at in one go.
SCORES_AT_ONCE = 2**20

# The parts of a pre-norm transformer block, under the names that towers give them: the norm of the attention's input,
# and the module whose output is added to the residual.
_NORMS = ("layer_norm1", "norm1", "layernorm_before")
_BRANCH_ENDS = ("layer_scale1", "ls1", "self_attn", "attention", "attn")


class TemporalContextualizer(nn.Module):
    """Attention over the frames of a video, at each place by itself, in one block of a vision tower.

    Between the block's attention and its feed-forward it adds to each token what the other frames say:
    `x + alpha * softmax(query(x) key(x)ᵀ * scale) x`. Values are the tokens themselves, cut into heads; there is no
    output projection. The scale is `hidden_size**-0.5`, of the whole width and not a head's. `alpha` is a scalar that
    is learned and starts at zero. Source: `temporal_merge` of the original (yiren-jian/EVLGen).

    The block's own code and parameter names stay as they are. It computes `x + branch(norm(x))`; hooks on `norm` and
    `branch` add what the frames say to what `branch` gives.

    Args:
        dim (`int`): Width of the tokens, a multiple of `num_heads`.
        hidden_size (`int`): Width of queries and keys, a multiple of `num_heads`.
        num_heads (`int`): Heads.
    """

    def __init__(self, dim: int, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scaling = hidden_size**-0.5
        self.query = nn.Linear(dim, hidden_size)
        self.key = nn.Linear(dim, hidden_size)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.num_frames: int | None = None  # of each video, while a batch of videos runs through the tower
        self.frame_mask: torch.Tensor | None = None
        self._residual: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(videos, frames, tokens, dim)`): The tokens of all frames.
            frame_mask (`torch.BoolTensor` of shape `(videos, frames)`, *optional*): False for frames that are padding.

        Returns:
            `torch.Tensor` of the same shape: what is to be added to `hidden_states`.
        """
        # Places are independent of each other; the scores of all of them at once would fill memory in long clips.
        places = max(1, SCORES_AT_ONCE // hidden_states.shape[1] ** 2)
        parts = [self._attend(part, frame_mask) for part in hidden_states.split(places, dim=2)]
        return (self.alpha * torch.cat(parts, dim=2)).to(hidden_states.dtype)

    def _attend(self, hidden_states: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
        videos, frames, tokens, dim = hidden_states.shape
        inputs = hidden_states.to(self.query.weight.dtype).transpose(1, 2)  # (videos, tokens, frames, dim)
        heads = (videos, tokens, frames, self.num_heads, -1)
        query = self.query(inputs).view(heads).transpose(2, 3)  # (videos, tokens, heads, frames, head_dim)
        key = self.key(inputs).view(heads).transpose(2, 3)
        value = inputs.reshape(heads).transpose(2, 3)  # (videos, tokens, heads, frames, dim / heads)
        mask = None if frame_mask is None else frame_mask[:, None, None, None, :]
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        return context.permute(0, 3, 1, 2, 4).reshape(videos, frames, tokens, dim)

    def join(self, norm: nn.Module, branch: nn.Module) -> None:
        """Puts the contextualizer into the block whose attention reads `norm` and ends in `branch`."""
        norm.register_forward_pre_hook(self._keep_residual)
        branch.register_forward_hook(self._add_context)

    def _keep_residual(self, norm: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if self.num_frames is not None:
            self._residual = arguments[0]

    def _add_context(self, branch: nn.Module, arguments: Any, output: Any) -> Any:
        if self.num_frames is None:
            return output
        attended = output[0] if isinstance(output, tuple) else output
        hidden_states = self._residual + attended  # (videos * frames, tokens, dim)
        self._residual = None
        video = hidden_states.unflatten(0, (-1, self.num_frames))
        attended = attended + self(video, self.frame_mask).flatten(0, 1)
        return (attended, *output[1:]) if isinstance(output, tuple) else attended


class TemporalTower(nn.ModuleList):
    """One [`TemporalContextualizer`] for each block of a vision tower.

    Args:
        vision_tower (`PreTrainedModel`): A transformer of pre-norm blocks.
        dim, hidden_size, num_heads: As in [`TemporalContextualizer`].

    Raises:
        ValueError: If the tower has no such blocks.
    """

    def __init__(self, vision_tower: PreTrainedModel, dim: int, hidden_size: int, num_heads: int):
        blocks = list(_find_blocks(vision_tower))
        if not blocks:
            raise ValueError(
                f"`temporal_contextualizer` needs a vision tower of pre-norm transformer blocks, but "
                f"{type(vision_tower).__name__} has none. Without it, a video is the mean of its frames."
            )
        super().__init__(TemporalContextualizer(dim, hidden_size, num_heads) for _ in blocks)
        for contextualizer, (norm, branch) in zip(self, blocks, strict=True):
            contextualizer.join(norm, branch)

    @contextmanager
    def frames(self, num_frames: int, frame_mask: torch.Tensor | None = None) -> Iterator[None]:
        """While this is open, the tower's batch is `videos * num_frames` images, and frames of a video see each other.

        Args:
            num_frames: Frames of each video.
            frame_mask (`torch.BoolTensor` of shape `(videos, frames)`, *optional*): False for frames that are padding.
        """
        self._set(num_frames, frame_mask)
        try:
            yield
        finally:
            self._set(None, None)

    def _set(self, num_frames: int | None, frame_mask: torch.Tensor | None) -> None:
        for contextualizer in self:
            contextualizer.num_frames, contextualizer.frame_mask = num_frames, frame_mask


def encode_videos(
    vision_tower: PreTrainedModel,
    temporal: TemporalTower | None,
    pixel_values: torch.Tensor,
    frame_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a vision tower over the frames of videos, and takes the mean over the frames.

    Args:
        vision_tower (`PreTrainedModel`): The tower.
        temporal ([`TemporalTower`], *optional*): What its blocks let the frames see of each other, if anything.
        pixel_values (`torch.Tensor` of shape `(videos, frames, channels, height, width)`): The videos.
        frame_mask (`torch.BoolTensor` of shape `(videos, frames)`, *optional*): False for frames that are padding.

    Returns:
        `torch.Tensor` of shape `(videos, tokens, dim)`.
    """
    videos, num_frames = pixel_values.shape[:2]
    if frame_mask is None:
        weight = torch.full((videos, num_frames), 1 / num_frames, device=pixel_values.device)
    else:
        weight = frame_mask / frame_mask.sum(dim=1, keepdim=True)  # (videos, frames)
    if temporal is not None:
        with temporal.frames(num_frames, frame_mask):
            return _weighted_mean(vision_tower, pixel_values, weight)
    # Frames that do not see each other can come one after the other, in as little memory as a few of them take.
    at_once = num_frames if torch.is_grad_enabled() else max(1, IMAGES_AT_ONCE // videos)
    parts = zip(pixel_values.split(at_once, dim=1), weight.split(at_once, dim=1), strict=True)
    return sum(_weighted_mean(vision_tower, frames, part) for frames, part in parts)


def _weighted_mean(vision_tower: PreTrainedModel, frames: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    tokens = extract_vision_tokens(vision_tower, frames.flatten(0, 1)).unflatten(0, weight.shape)
    return torch.einsum("vf,vftd->vtd", weight.to(tokens.dtype), tokens)  # (videos, tokens, dim)


def _find_blocks(vision_tower: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The attention's norm, and the module that ends the attention's branch, of each block."""
    for module in vision_tower.modules():
        parts = dict(module.named_children())
        norm = next((parts[name] for name in _NORMS if name in parts), None)
        branch = next((parts[name] for name in _BRANCH_ENDS if name in parts), None)
        if norm is not None and branch is not None and "mlp" in parts:
            yield norm, branch
