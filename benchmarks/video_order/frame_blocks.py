"""The temporal contextualizer on the features of a CNN, trained with the connector.

In the paper it is in each block of a vision transformer, between attention and feed-forward. A CNN has no such blocks.
So two blocks of CLIP's kind follow it, each with a contextualizer. They start as the identity. To save time, they run
on 7 x 7 means of the tokens.

With frame positions, the contextualizer adds a frame's time to its tokens, and the feed-forward may combine time and
content. So the mean over frames can keep the order. Without them, it is the same for each order of the frames.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from modeling_evlgen.temporal import TemporalTower, frames_of_videos

from .clip_pooling import MEAN, pool_clips
from .ordered_clips import Clip

CONTEXTUALIZER, POSITIONS = CONTEXTUALIZERS = ("contextualizer", "contextualizer with frame positions")
BLOCKS, HEADS, SIDE = 2, 4, 7
FRAMES_AT_ONCE = 256  # of all videos together


@dataclass(frozen=True)
class ClipFrames:
    """The features of each video's frames by the video's index. They are gathered when they are needed.

    Args:
        clips (`list[Clip]`): The videos.
        frames (`torch.Tensor` of shape `(frames, tokens, dim)`): The features of all frames.
    """

    clips: list[Clip]
    frames: torch.Tensor

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.frames[list(self.clips[index].frames)]  # (length, tokens, dim)


class FrameBlocks(nn.Module):
    """Transformer blocks in which frames attend to each other, and then the mean over frames.

    Args:
        frames (`torch.Tensor` of shape `(frames, tokens, dim)`): Features of some frames. They give the scale.
        frame_positions (`bool`): Whether the contextualizers have frame positions.
    """

    def __init__(self, frames: torch.Tensor, frame_positions: bool):
        super().__init__()
        dim = frames.shape[-1]
        self.scale = frames.float().std().item()  # features of the CNN are about 7, those in a transformer about 1
        config = CLIPVisionConfig(
            hidden_size=dim,
            intermediate_size=4 * dim,
            num_attention_heads=HEADS,
            hidden_act="gelu",
            attn_implementation="sdpa",
        )
        self.blocks = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(BLOCKS))
        self.temporal = TemporalTower(self.blocks, dim, dim, HEADS, frame_positions)
        for block in self.blocks:  # as the branches of the connector
            for branch_end in (block.self_attn.out_proj, block.mlp.fc2):
                nn.init.zeros_(branch_end.weight)
                nn.init.zeros_(branch_end.bias)

    def forward(self, videos: list[torch.Tensor]) -> torch.Tensor:
        """Pools videos, each `(its length, tokens, dim)`, to `(videos, tokens, dim)`."""
        pooled: dict[int, torch.Tensor] = {}  # by the video's index; videos of one length run together
        for length in {len(video) for video in videos}:
            indices = [index for index, video in enumerate(videos) if len(video) == length]
            at_once = max(1, FRAMES_AT_ONCE // length)
            for start in range(0, len(indices), at_once):
                part = indices[start : start + at_once]
                pooled |= zip(part, self._pool(torch.stack([videos[index].float() for index in part])), strict=True)
        return torch.stack([pooled[index] for index in range(len(videos))])

    def _pool(self, videos: torch.Tensor) -> torch.Tensor:
        hidden_states = videos.flatten(0, 1) / self.scale  # (videos * frames, tokens, dim)
        with frames_of_videos(videos.shape[1]):
            for block in self.blocks:
                hidden_states = block(hidden_states, attention_mask=None)
        return self.scale * hidden_states.unflatten(0, videos.shape[:2]).mean(dim=1)


def mean_and_frames(split: str, clips: list[Clip], frames: torch.Tensor) -> dict[str, torch.Tensor | ClipFrames]:
    """The mean of frames of each video, `features`, and its `frames`, with `SIDE * SIDE` tokens of `dim` each.

    Args:
        split (`str`): The split's name.
        clips (`list[Clip]`): The videos of the split.
        frames (`torch.Tensor` of shape `(emoji, tones, frames, tokens, dim)`): Features of the split's frames.
    """
    means = pool_clips(MEAN, split, clips, frames)["features"]
    return {"features": _coarsen(means), "frames": ClipFrames(clips, _coarsen(frames.flatten(0, 2)))}


def _coarsen(tokens: torch.Tensor) -> torch.Tensor:
    """Means of square parts of images `(images, tokens, dim)`."""
    side = round(tokens.shape[1] ** 0.5)
    grid = tokens.float().transpose(1, 2).unflatten(2, (side, side))  # (images, dim, rows, columns)
    return F.adaptive_avg_pool2d(grid, SIDE).flatten(2).transpose(1, 2).half()
