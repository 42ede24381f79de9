"""Draws which patches of a picture became which token of the soft prompt, layer by layer.

    python examples/visualize_merging.py --model outputs/demo --images a.png b.png --output merging.png

Each row is a picture, as the model sees it, and what each layer of the connector leaves of it: patches that
have become one token share their mean colour and one outline. Needs `.[train]`.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from modeling_evlgen import EVLGenForConditionalGeneration, TomeFormerModel
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import load_rgb_image

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

SIDE = 448  # pixels that a picture is drawn with


@torch.no_grad()
def merged_tokens(model: EVLGenForConditionalGeneration, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Where each vision token has gone behind each layer of the connector.

    Args:
        model ([`EVLGenForConditionalGeneration`]): The model.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Images from the processor.

    Returns:
        `list[torch.Tensor]`: For each layer, `(images, num_vision_tokens)`, the index of the token that each
        vision token is part of. The last one is the place in the soft prompt.
    """
    if not isinstance(model.connector, TomeFormerModel):
        raise ValueError(f"Tokens are merged by a TomeFormer, but the model has a {type(model.connector).__name__}.")
    composed: list[torch.Tensor] = []

    def compose(layer: torch.nn.Module, arguments: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        layer_index = output[1]
        composed.append(layer_index if not composed else layer_index.gather(1, composed[-1]))

    hooks = [layer.register_forward_hook(compose) for layer in model.connector.encoder.layer]
    try:
        model.get_image_features(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return composed


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


def draw_merging(
    model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, sources: list[str], path: str | Path
) -> None:
    """Draws one row for each picture, one column for each layer.

    Args:
        model, processor: The captioner.
        sources: Pictures: paths or URLs.
        path: The PNG file to write.
    """
    images = [load_rgb_image(source).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for source in sources]
    pixel_values = processor(images=list(sources))["pixel_values"].to(model.device)
    layers = merged_tokens(model, pixel_values)
    prefix, side = patch_grid(model)
    figure, axes = plt.subplots(
        len(images),
        1 + len(layers),
        figsize=(2.2 * (1 + len(layers)), 2.4 * len(images)),
        layout="constrained",
        squeeze=False,
    )
    for panel in axes.flat:
        panel.axis("off")
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        for column, index in enumerate(layers, start=1):
            groups = index[row, prefix:].reshape(side, side).cpu().numpy()
            axes[row, column].imshow(draw_groups(image, groups))
            axes[row, column].set_title(f"layer {column}: {int(index[row].max()) + 1} tokens", fontsize=8)
        axes[row, 0].set_title(f"{side} x {side} patches", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo", help="Captioner: a folder or a name on the Hub.")
    parser.add_argument("--images", nargs="+", required=True, help="Pictures: paths or URLs.")
    parser.add_argument("--output", type=Path, default=Path("merging.png"), help="PNG file to write.")
    arguments = parser.parse_args(argv)
    model = EVLGenForConditionalGeneration.from_pretrained(arguments.model)
    processor = EVLGenProcessor.from_pretrained(arguments.model)
    draw_merging(model, processor, arguments.images, arguments.output)
    print(f"Drew {len(arguments.images)} pictures to {arguments.output}.")


if __name__ == "__main__":
    main()
