"""Runs the captioner for the page: text as it grows, the merging, and the time of each part of the model."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import timer
from transformers import TextIteratorStreamer

from common.evaluation.merging_overlay import (
    patch_groups,
    recorded_merging,
    resize_to_side,
    token_counts,
    trace_frames,
)
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor
from processing_evlgen.videos import sample_frames

SHOWN_FRAMES = 16  # of a video
PROMPT_CHARACTERS = 10_000  # checked before the prompt is tokenised: 20 MB take 26 s
# A visitor who presses Stop may leave a thread behind. Hooks belong to the model, so they would record both threads.
_MERGING_LOCK = Lock()


@dataclass
class Merging:
    """The frames of an image or some frames of a video, and their merging, as the page shows them.

    `groups` and `counts` have an entry before the connector, and one for each entry of [`recorded_merging`]. They hold
    the token that each patch belongs to, of shape `(rows, columns)` or, if frames differ, `(frames, rows, columns)`,
    and the number of tokens. They are empty before the model has run. `num_frames` counts the frames that are not
    shown, too. `num_image_tokens` is the length of the soft prompt.
    """

    frames: list[Image.Image]
    groups: list[np.ndarray] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    num_frames: int = 1
    num_image_tokens: int = 0


@contextmanager
def timed(milliseconds: dict[str, float], part: str) -> Iterator[None]:
    """Stores in `milliseconds[part]` how long the block takes."""
    start = timer()  # waits for a GPU, if there is one
    yield
    milliseconds[part] = 1e3 * (timer() - start)


def stream_text(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    milliseconds: dict[str, float],
) -> Iterator[str]:
    """Generates text and yields it as it grows; with several beams it yields only the whole text.

    `inputs` and `settings` are arguments of `generate`. `milliseconds` receives the time of the `"language model"`.
    """

    def generate(**arguments: Any) -> torch.Tensor:
        with timed(milliseconds, "language model"):
            return model.generate(**inputs, **settings, **arguments)

    if settings["num_beams"] > 1:
        yield processor.decode(generate()[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, text = Event(), ""
    with ThreadPoolExecutor(max_workers=1) as executor:
        generation = executor.submit(generate, streamer=streamer, stopping_criteria=[lambda *_, **__: stop.is_set()])
        # If `generate` fails, it does not end the stream, and the loop below would wait for ever.
        generation.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))
        try:
            for piece in streamer:
                text += piece
                yield text.strip()
            generation.result()
        finally:  # also reached when the visitor has left
            stop.set()


def generation_settings(num_beams: int, temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    """Returns the visitor's options as arguments of `generate`. A temperature of 0 takes the likeliest token.

    A ValueError names an option that is out of range, and a TypeError one that is not a number.
    """
    options = {"num_beams": num_beams, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    for name, value in options.items():  # through the API they may be anything that JSON holds
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"`{name}` must be a number, but is {value!r}.")
    for name in ("num_beams", "max_new_tokens"):
        if options[name] < 1 or options[name] % 1:
            raise ValueError(f"`{name}` must be a whole number of 1 or more, but is {options[name]}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"`temperature` must be 0 or more, but is {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be above 0 and at most 1, but is {top_p}.")
    settings = {"num_beams": int(num_beams), "max_new_tokens": int(max_new_tokens), "do_sample": temperature > 0}
    return settings | ({"temperature": temperature, "top_p": top_p} if temperature > 0 else {})


@torch.no_grad()
def describe(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    modality: str,
    frames: list[Image.Image],
    prompt: str,
    settings: dict[str, Any],
    num_image_tokens: int | None = None,
) -> Iterator[tuple[str, Merging, dict[str, float]]]:
    """Runs the captioner part by part on the frames from [`read_file`], with [`generation_settings`].

    Yields the text so far, at first empty, the merging, and the milliseconds of `"tower"`, `"connector"` and, at the
    end, `"language model"`. A ValueError names a prompt that is too long or does not fit the frames.
    """
    if len(prompt) > PROMPT_CHARACTERS:
        raise ValueError(f"The prompt has {len(prompt)} characters, but at most {PROMPT_CHARACTERS} are read.")
    budgets = [processor.num_image_tokens if num_image_tokens is None else num_image_tokens]
    if not isinstance(budgets[0], int):  # through the API it may be anything that JSON holds
        raise TypeError(f"`num_image_tokens` must be a whole number, but is {num_image_tokens!r}.")
    model.config.read_budgets("num_image_tokens", budgets, 1)  # raises out of range
    sampling = {"do_sample_frames": False} if modality == "videos" else {}
    inputs = processor(**{modality: frames}, text=prompt, num_image_tokens=budgets[0], **sampling).to(model.device)
    grid = inputs.pop("image_grid_thw", None)
    pixel_values = inputs.pop("pixel_values" if modality == "images" else "pixel_values_videos")
    times = inputs.pop("frame_times", None)
    milliseconds: dict[str, float] = {}
    with _MERGING_LOCK:
        with timed(milliseconds, "tower"):
            vision_features, places, index = trace_frames(model, pixel_values, times)
        with timed(milliseconds, "connector"), recorded_merging(model) as layers:
            soft_prompt = model.project_vision_features(vision_features, grid, budgets, places)
    tiles = (1, 1) if grid is None else tuple(grid[0, 1:].tolist())
    layers = [torch.arange(layers[0].shape[1])[None], *layers]  # (1, tokens of all tiles) each
    counts, shown = token_counts(layers), sample_frames(len(frames), SHOWN_FRAMES)
    if index is not None:
        layers = [layer[0, index[shown]] for layer in layers]  # (shown frames, tokens) each
    groups = patch_groups(model, layers, tiles)
    merging = Merging([resize_to_side(frames[number]) for number in shown], groups, counts, len(frames), budgets[0])
    yield "", merging, milliseconds
    inputs = {**inputs, "mm_encoder_outputs": {modality.removesuffix("s"): soft_prompt}}
    text = ""
    for text in stream_text(model, processor, inputs, settings, milliseconds):
        yield text, merging, milliseconds
    yield text, merging, milliseconds
