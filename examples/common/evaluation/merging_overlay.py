"""Which patches became which token of the soft prompt, drawn over an image or over the frames of a video."""

import colorsys
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.tomeformer import TomeFormerLayer

SIDE = 448  # pixels that an image is drawn with
TINT = 0.6  # how much of a token's colour covers the image


@contextmanager
def recorded_merging(model: EVLGenForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """While this is open, the connector's next forward fills a list with where each vision token goes.

    Yields:
        `list[torch.Tensor]`: Empty at first. Then for each layer of the connector `(images, num_vision_tokens)`, the
        index of the token that each vision token is part of. The last one is the place in the soft prompt.

    Raises:
        ValueError: If the connector is no TomeFormer.
    """
    # Below an adapter there are two connectors, the base model's and the trained one; only one of them runs.
    tomeformer_layers = [module for module in model.connector.modules() if isinstance(module, TomeFormerLayer)]
    if not tomeformer_layers:
        connector = getattr(model.connector, "original_module", model.connector)  # within PEFT's wrapper
        raise ValueError(f"Tokens are merged by a TomeFormer, but the model has a {type(connector).__name__}.")
    composed: list[torch.Tensor] = []

    def compose(layer: torch.nn.Module, arguments: tuple, output: tuple[torch.Tensor, ...]) -> None:
        layer_index = output[1]
        composed.append(layer_index if not composed else layer_index.gather(1, composed[-1]))

    hooks = [layer.register_forward_hook(compose) for layer in tomeformer_layers]
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
    """For each layer `(side, side)`, the token that each patch of one image or video is part of.

    Args:
        model ([`EVLGenForConditionalGeneration`]): The model.
        layers: What [`merged_tokens`] gives.
        row: Which image or video of the batch.
    """
    prefix, side = patch_grid(model)
    return [index[row, prefix:].reshape(side, side).cpu().numpy() for index in layers]


def token_counts(layers: list[torch.Tensor], row: int = 0) -> list[int]:
    """How many tokens each layer leaves of one image or video, class and register tokens among them."""
    return [int(index[row].max()) + 1 for index in layers]


def resize_to_side(image: Image.Image) -> Image.Image:
    """The image as it is drawn, and as the model sees it: SIDE x SIDE pixels, without a crop."""
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def draw_groups(image: Image.Image, groups: np.ndarray) -> Image.Image:
    """Tints, outlines and numbers the patches of each token.

    All patches of a token have one colour and one number, its place among the layer's tokens, wherever they lie. A
    token keeps the colour of its first patch from layer to layer, and so do those it is merged with.

    Args:
        image: The image, SIDE x SIDE pixels.
        groups: `(side, side)`, the token that each patch is part of.

    Returns:
        `PIL.Image.Image`, SIDE x SIDE pixels, RGB.
    """
    side = len(groups)
    _, first_patches, tokens = np.unique(groups, return_index=True, return_inverse=True)
    colors = np.array([_color(patch) for patch in first_patches])[tokens.reshape(side, side)]  # (side, side, 3)
    rows = np.arange(SIDE) * side // SIDE
    pixels = (1 - TINT) * np.asarray(image, dtype=np.float64) + TINT * colors[rows][:, rows]
    labels = groups[rows][:, rows]  # (SIDE, SIDE)
    pixels[1:][labels[1:] != labels[:-1]] *= 0.2
    pixels[:, 1:][labels[:, 1:] != labels[:, :-1]] *= 0.2
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    _write_numbers(drawn, groups)
    return drawn


def _color(patch: int) -> tuple[float, float, float]:
    """A colour, 0 to 255; those of patches near each other are far apart."""
    hue, lightness = patch * (math.sqrt(5) - 1) / 2 % 1, (0.45, 0.6, 0.75)[patch % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return 255 * red, 255 * green, 255 * blue


def _write_numbers(drawn: Image.Image, groups: np.ndarray) -> None:
    """Writes each token's number wherever its patches have an upper left corner, as large as a patch has room for."""
    patch = SIDE / len(groups)
    digits = len(str(groups.max()))
    font = ImageFont.load_default(size=patch * min(0.75, 1.4 / digits))
    draw = ImageDraw.Draw(drawn)
    for (row, column), token in np.ndenumerate(groups):
        if (row and groups[row - 1, column] == token) or (column and groups[row, column - 1] == token):
            continue
        center = (patch * (column + 0.5), patch * (row + 0.5))
        draw.text(center, str(token), "black", font, anchor="mm", stroke_width=patch / 20, stroke_fill="white")
