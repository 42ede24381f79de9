"""Which patches became which token of the soft prompt, drawn over a picture or over the frames of a clip."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from modeling_evlgen import EVLGenForConditionalGeneration, TomeFormerModel

SIDE = 448  # pixels that a picture is drawn with


@contextmanager
def recorded_merging(model: EVLGenForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """While this is open, the connector's next forward fills a list with where each vision token goes.

    Yields:
        `list[torch.Tensor]`: Empty at first. Then for each layer of the connector `(images, num_vision_tokens)`, the
        index of the token that each vision token is part of. The last one is the place in the soft prompt.

    Raises:
        ValueError: If the connector is no TomeFormer.
    """
    if not isinstance(model.connector, TomeFormerModel):
        raise ValueError(f"Tokens are merged by a TomeFormer, but the model has a {type(model.connector).__name__}.")
    composed: list[torch.Tensor] = []

    def compose(layer: torch.nn.Module, arguments: tuple, output: tuple[torch.Tensor, ...]) -> None:
        layer_index = output[1]
        composed.append(layer_index if not composed else layer_index.gather(1, composed[-1]))

    hooks = [layer.register_forward_hook(compose) for layer in model.connector.encoder.layer]
    try:
        yield composed
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def merged_tokens(
    model: EVLGenForConditionalGeneration, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Where each vision token has gone behind each layer of the connector.

    Args:
        model ([`EVLGenForConditionalGeneration`]): The model.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`):
            Images from the processor; or videos, of shape `(videos, frames, channels, height, width)`. The frames of
            a video are one set of tokens before the connector, so that they are merged alike.
        frame_mask (`torch.BoolTensor` of shape `(videos, frames)`, *optional*):
            False for frames that only fill a short video up.

    Returns:
        `list[torch.Tensor]`: As [`recorded_merging`] fills it, `(images or videos, num_vision_tokens)` each.

    Raises:
        ValueError: If the connector is no TomeFormer.
    """
    with recorded_merging(model) as layers:
        model.project_vision_features(model.get_vision_features(pixel_values, frame_mask))
    return layers


def patch_grid(model: EVLGenForConditionalGeneration) -> tuple[int, int]:
    """Tokens before the first patch (class and register tokens), and patches along each side.

    Raises:
        ValueError: If the patches of this tower are not a square.
    """
    tokens = model.config.num_vision_tokens
    side = math.isqrt(tokens)
    prefix = tokens - side * side
    registers = getattr(model.config.vision_config, "num_register_tokens", 0)
    if prefix != int(model.config.connector_config.class_token) + registers:
        raise ValueError(f"The vision tower's {tokens} tokens are no square of patches.")
    return prefix, side


def patch_groups(model: EVLGenForConditionalGeneration, layers: list[torch.Tensor], row: int = 0) -> list[np.ndarray]:
    """For each layer `(side, side)`, the token that each patch of one picture or clip is part of.

    Args:
        model ([`EVLGenForConditionalGeneration`]): The model.
        layers: What [`merged_tokens`] gives.
        row: Which picture or clip of the batch.
    """
    prefix, side = patch_grid(model)
    return [index[row, prefix:].reshape(side, side).cpu().numpy() for index in layers]


def token_counts(layers: list[torch.Tensor], row: int = 0) -> list[int]:
    """How many tokens each layer leaves of one picture or clip, class and register tokens among them."""
    return [int(index[row].max()) + 1 for index in layers]


def resize_to_side(image: Image.Image) -> Image.Image:
    """The picture as it is drawn, and as the model sees it: SIDE x SIDE pixels, without a crop."""
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def draw_groups(image: Image.Image, groups: np.ndarray) -> np.ndarray:
    """Fills each group of patches with its mean colour and outlines it.

    Args:
        image: The picture, SIDE x SIDE pixels.
        groups: `(side, side)`, the token that each patch is part of.

    Returns:
        `(SIDE, SIDE, 3)`, uint8.
    """
    pixels = np.asarray(image, dtype=np.float64)
    rows = np.arange(SIDE) * groups.shape[0] // SIDE
    labels = groups[rows][:, rows]  # (SIDE, SIDE)
    filled = np.empty_like(pixels)
    for label in np.unique(groups):
        filled[labels == label] = pixels[labels == label].mean(axis=0)
    outline = np.zeros((SIDE, SIDE), dtype=bool)
    outline[1:] |= labels[1:] != labels[:-1]
    outline[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    filled[outline] = 0.35 * filled[outline]
    return filled.round().astype(np.uint8)
