"""Records how the connector merges or chooses tokens, and draws it over an image or a video's frames."""

import base64
import colorsys
import html
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.benchmark import timer
from transformers import BatchFeature

from configuration_evlgen import QFormerConnectorConfig, TomeFormerConfig
from modeling_evlgen import (
    EVLGenForConditionalGeneration,
    EVLGenImageOutput,
    ExplainedWord,
    QFormerConnector,
    TomeFormerModel,
)
from modeling_evlgen.explanations import patch_grid, trace_frames

SIDE = 448  # width and height in pixels of a drawn image
TINT = 0.35  # opacity of a token's colour over the image, 0 to 1
DOUBTFUL = 0.5  # words of a lower confidence are underlined
STRIP = 32  # height in pixels of the words below an image
MAX_NUMBERED = 32  # tokens in a drawing with numbers; more of them would hide the image


@dataclass
class Merging:
    """The tokens of one image or video: before the connector, and after each entry of [`layer_names`].

    `groups` holds the token that each patch is part of, int64, `(rows, columns)`; if the frames of a video differ, it
    is `(frames, rows, columns)`.
    """

    groups: list[np.ndarray]
    counts: list[int]  # of tokens, including class and register tokens
    num_image_tokens: int  # length of the soft prompt
    milliseconds: dict[str, float]  # of the "tower" and of the "connector"

    def of_frame(self, layer: int, frame: int) -> np.ndarray:
        """The groups of one frame, `(rows, columns)`. Layer 0 is before the connector."""
        return self.groups[layer] if self.groups[layer].ndim == 2 else self.groups[layer][frame]


def layer_names(model: EVLGenForConditionalGeneration) -> list[str]:
    """Names the layers that merge, or the choice of tokens. A connector that does neither raises a ValueError."""
    config = model.config.connector_config
    if isinstance(config, TomeFormerConfig):
        return [f"layer {number}" for number in range(1, config.num_hidden_layers + 1)]
    if isinstance(config, QFormerConnectorConfig) and config.num_distinctive_tokens is not None:
        return ["choice"]
    raise ValueError(
        "The model's connector must be a TomeFormer or a Q-Former with `num_distinctive_tokens`, but its `model_type` "
        f"is {config.model_type!r}, and it neither merges nor chooses tokens."
    )


@torch.no_grad()
def trace_merging(
    model: EVLGenForConditionalGeneration, inputs: BatchFeature, num_image_tokens: int, frames: list[int] | None = None
) -> tuple[EVLGenImageOutput, Merging]:
    """Runs tower and connector on the processor's image or video. Raises as [`layer_names`] does.

    The frames of a video share one merging, if they are averaged to one set of tokens before the connector. With
    `config.video_mode` "merge" each frame has its own. `frames` are the indices of those to keep, by default all.
    """
    layer_names(model)
    grid, times = inputs.get("image_grid_thw"), inputs.get("frame_times")
    pixel_values = inputs["pixel_values" if "pixel_values" in inputs else "pixel_values_videos"]
    milliseconds: dict[str, float] = {}
    with timed(milliseconds, "tower"):
        features, places, index = trace_frames(model, pixel_values, times)
    with timed(milliseconds, "connector"), recorded_merging(model) as layers:
        soft_prompt = model.project_vision_features(features, grid, [num_image_tokens], places)
    # On the CPU, (1, tokens of all tiles) each.
    layers = [torch.arange(layers[0].shape[1])[None], *(layer.cpu() for layer in layers)]
    counts = [int(layer.max()) + 1 for layer in layers]
    if index is not None:
        index = index.cpu() if frames is None else index[frames].cpu()
        layers = [layer[0, index] for layer in layers]  # (frames, tokens) each
    prefix, side = patch_grid(model)
    rows, columns = (1, 1) if grid is None else grid[0, 1:].tolist()  # of tiles
    groups = [layer[:, prefix:].reshape(-1, rows * side, columns * side).numpy() for layer in layers]
    groups = [group[0] if len(group) == 1 else group for group in groups]
    return soft_prompt, Merging(groups, counts, num_image_tokens, milliseconds)


@contextmanager
def timed(milliseconds: dict[str, float], part: str) -> Iterator[None]:
    """Stores in `milliseconds[part]` how long the block takes."""
    start = timer()  # waits for a GPU, if there is one
    yield
    milliseconds[part] = 1e3 * (timer() - start)


@contextmanager
def recorded_merging(model: EVLGenForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """Yields a list that gets the `layer_index` of the connector's forward pass: `(images, tokens)` each."""
    # PEFT's wrapper holds two connectors, the base model's and the trained one. Only one of them runs.
    kinds = TomeFormerModel, QFormerConnector
    connectors = [module for module in model.connector.modules() if isinstance(module, kinds)]
    layers: list[torch.Tensor] = []
    hooks = [
        connector.register_forward_hook(lambda module, arguments, output: layers.extend(output.layer_index))
        for connector in connectors
    ]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def resize_to_side(image: Image.Image) -> Image.Image:
    """Resizes an image to SIDE x SIDE pixels without a crop, as the image processor does at the tower's size."""
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def draw_groups(image: Image.Image, groups: np.ndarray) -> Image.Image:
    """Tints and outlines the patches of each token, and numbers its regions if there are at most [`MAX_NUMBERED`].

    All patches of a token have one colour and one number, the token's position. The colour is that of the token's
    first patch, so that it stays the same from layer to layer. Images are RGB, SIDE x SIDE pixels.
    """
    _, first_patches, tokens = np.unique(groups, return_index=True, return_inverse=True)
    colors = np.array([_color(patch) for patch in first_patches])[tokens.reshape(groups.shape)]  # (rows, columns, 3)
    # The row and column of patches that each row and column of pixels lies in, (SIDE,) each.
    rows, columns = (np.arange(SIDE) * count // SIDE for count in groups.shape)
    pixels = (1 - TINT) * np.asarray(image, dtype=np.float64) + TINT * colors[rows][:, columns]
    labels = groups[rows][:, columns]  # (SIDE, SIDE)
    # A dark outline where two neighbouring pixels belong to different tokens.
    pixels[1:][labels[1:] != labels[:-1]] *= 0.5
    pixels[:, 1:][labels[:, 1:] != labels[:, :-1]] *= 0.5
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    if len(first_patches) <= MAX_NUMBERED:
        _write_numbers(drawn, groups)
    return drawn


def draw_words(image: Image.Image, words: list[ExplainedWord], frame: int = 0) -> Image.Image:
    """Draws the place of each word with an evidence of 1 or more in its own colour; of a video, those in one frame.

    Below the image, of SIDE x SIDE pixels, is a strip with all words. Its shade is their evidence.
    """
    drawn = Image.new("RGB", (SIDE, SIDE + STRIP), "white")
    drawn.paste(image)
    draw, left, most = ImageDraw.Draw(drawn), 0.0, max([1.0, *(word.evidence for word in words)])
    width = SIDE / max(20, sum(len(word.word) + 1 for word in words))  # of a letter
    for number, word in enumerate(words):
        color = tuple(map(round, _color(number)))
        share = min(1.0, max(0.0, word.evidence / most))
        shade = tuple(round(255 + (part - 255) * share) for part in color)
        right = left + width * (len(word.word) + 1)
        draw.rectangle((left, SIDE, right, SIDE + STRIP), shade)
        font = ImageFont.load_default(size=min(0.6 * STRIP, 1.6 * width))
        draw.text(((left + right) / 2, SIDE + STRIP / 2), word.word, "black", font, anchor="mm")
        left = right
        if word.evidence >= 1 and word.frame == frame:
            draw.rectangle([SIDE * edge for edge in word.box], outline=color, width=4)
    return drawn


def words_page(frames: list[Image.Image], words: list[ExplainedWord]) -> str:
    """HTML of a text. Pointing at a word shows its frame, dark where its map is 0 or less. It needs no script.

    Doubtful words are underlined. Images are RGB, SIDE x SIDE pixels.
    """
    layers, texts, rules = [f"<img src='{_data_url(frames[0])}'>"], [], []
    for number, word in enumerate(words):
        values = word.map[word.frame] if word.map.ndim == 3 else word.map
        light = values.clamp(min=0) / values.amax().clamp(min=1e-6)  # (rows, columns)
        light = Image.fromarray((255 * light).byte().numpy()).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        dark = Image.eval(frames[word.frame], lambda value: value // 4)
        lit = _data_url(Image.composite(frames[word.frame], dark, light))
        layers.append(f"<img class='place' id='place-{number}' src='{lit}'>")
        style = " style='text-decoration: underline wavy red'" if word.confidence < DOUBTFUL else ""
        title = f"{word.confidence:.0%}, evidence {word.evidence:z.1f}"
        texts.append(f"<span id='word-{number}' title='{title}'{style}>{html.escape(word.word)}</span>")
        rules.append(f".words:has(#word-{number}:hover) #place-{number} {{ opacity: 1 }}")
    style = f".words div {{ position: relative; max-width: {SIDE}px }} .words img {{ width: 100% }}"
    style += " .words p { overflow-wrap: anywhere }"
    style += " .words .place { position: absolute; left: 0; top: 0; opacity: 0 } " + " ".join(rules)
    return f"<div class='words'><style>{style}</style><p>{' '.join(texts)}</p><div>{''.join(layers)}</div></div>"


def _data_url(image: Image.Image) -> str:
    image.save(file := io.BytesIO(), "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _color(patch: int) -> tuple[float, float, float]:
    """Returns red, green and blue from 0 to 255. Neighbouring patches get colours that are far apart."""
    # Steps of the golden ratio never come close to an earlier hue.
    hue, lightness = patch * (math.sqrt(5) - 1) / 2 % 1, (0.45, 0.6, 0.75)[patch % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return 255 * red, 255 * green, 255 * blue


def _write_numbers(drawn: Image.Image, groups: np.ndarray) -> None:
    """Writes each token's number once into each of its regions, into the upper patch at its left."""
    height, width = (SIDE / count for count in groups.shape)  # of a patch
    font = ImageFont.load_default(size=0.55 * min(height, width))
    draw, rest = ImageDraw.Draw(drawn), Image.fromarray(groups.astype(np.int32))
    for (row, column), token in np.ndenumerate(groups):
        if rest.getpixel((column, row)) < 0:  # of a region that has its number
            continue
        ImageDraw.floodfill(rest, (column, row), -1)
        center = (width * (column + 0.5), height * (row + 0.5))
        draw.text(center, str(token), "black", font, anchor="mm", stroke_width=1, stroke_fill="white")
