"""Checks of the model's inputs, whose errors name the argument."""

from typing import Any

import torch
from transformers.utils import torch_compilable_check

from configuration_evlgen import EVLGenConfig


def check_pixels(
    pixel_values: torch.Tensor, frame_mask: torch.Tensor | None, frame_times: torch.Tensor | None
) -> None:
    """
    Raises:
        ValueError: If pixels have neither the shape of images nor that of videos. If `frame_mask` or `frame_times` do
            not fit them, or a video has no frame.
        TypeError: If `frame_mask` or `frame_times` is no tensor.
    """
    shape = tuple(pixel_values.shape)
    if len(shape) not in (4, 5):
        raise ValueError(
            "`pixel_values` must have shape (images, channels, height, width) or (videos, frames, channels, height, "
            f"width), but has {shape}."
        )
    if len(shape) == 5 and 0 in shape[:2]:
        raise ValueError(f"Pixels of videos must hold at least one frame of each video, but have shape {shape}.")
    for name, tensor in (("frame_mask", frame_mask), ("frame_times", frame_times)):
        if tensor is not None and not torch.is_tensor(tensor):
            raise TypeError(f"`{name}` must be a tensor, but is a {type(tensor).__name__}.")
        if tensor is not None and len(shape) == 4:
            raise ValueError(f"`{name}` is for videos, but `pixel_values` holds images.")
        if tensor is not None and tuple(tensor.shape) != shape[:2]:
            raise ValueError(f"`{name}` must have shape {shape[:2]}, but has {tuple(tensor.shape)}.")
    if frame_mask is not None:
        has_frame = frame_mask.bool().any(dim=1)  # (videos,)
        torch_compilable_check(
            has_frame.all(),
            lambda: (
                "`frame_mask` must have a frame in each video, but has none in the videos "
                f"{(~has_frame).nonzero().flatten().tolist()}."
            ),
        )


def check_vision_features(vision_features: torch.Tensor, config: EVLGenConfig) -> None:
    """
    Raises:
        TypeError: If `vision_features` is no tensor.
        ValueError: If its shape is not `(images, num_vision_tokens, vision_hidden_size)`.
    """
    if not torch.is_tensor(vision_features):
        raise TypeError(f"`vision_features` must be a tensor, but is a {type(vision_features).__name__}.")
    expected = (config.num_vision_tokens, config.vision_hidden_size)
    if vision_features.ndim != 3 or tuple(vision_features.shape[1:]) != expected:
        raise ValueError(
            f"`vision_features` must have shape (images, {expected[0]}, {expected[1]}), but has "
            f"{tuple(vision_features.shape)}."
        )


def check_token_places(
    token_places: torch.Tensor, vision_features: torch.Tensor, grids: list[tuple[int, int]]
) -> None:
    """
    Raises:
        ValueError: If `token_places` is no tensor of shape `(videos, num_vision_tokens, 3)`, or is not finite, or a
            grid has several tiles.
    """
    expected = (*vision_features.shape[:2], 3)
    if not torch.is_tensor(token_places) or tuple(token_places.shape) != expected:
        given = tuple(token_places.shape) if torch.is_tensor(token_places) else type(token_places).__name__
        raise ValueError(f"`token_places` must be a tensor of shape {expected}, but is {given}.")
    if len(grids) != len(vision_features):
        raise ValueError("`token_places` is for merged videos, but `image_grid_thw` has images of several tiles.")
    is_finite = token_places.isfinite().flatten(1).all(dim=1)  # (videos,)
    torch_compilable_check(
        is_finite.all(),
        lambda: (
            "`token_places` must be finite, but has NaN or infinity in the videos "
            f"{(~is_finite).nonzero().flatten().tolist()}."
        ),
    )


def check_length(length: int, cache: Any, config: EVLGenConfig) -> None:
    """
    Raises:
        ValueError: If new tokens, after those in the cache, are more than the language model has positions.
    """
    limit = getattr(config.text_config.get_text_config(), "max_position_embeddings", None)
    if limit is None:  # a model without positions, whose cache may not know its length
        return
    length += cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    if isinstance(limit, int) and isinstance(length, int) and length > limit:  # in a graph, lengths may be symbols
        raise ValueError(f"`input_ids` has {length} tokens, but the language model has places for {limit}.")


def check_finite(tensors: dict[str, torch.Tensor | tuple[torch.Tensor, ...] | None]) -> None:
    """
    Raises:
        ValueError: If a value is NaN or infinite; the message names the tensor, and its entries counted from 0.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):  # entries of different lengths
            tensor = torch.stack([entry.float().sum() for entry in tensor])
        entries = (
            []
            if tensor is None
            else (~tensor.isfinite()).reshape(len(tensor), -1).any(dim=1).nonzero().flatten().tolist()
        )
        if entries:
            raise ValueError(f"{name} must be finite, but has NaN or infinity in entries {entries}.")
