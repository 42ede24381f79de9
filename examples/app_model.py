"""Runs the captioner for the page: text as it grows, the merging, and the time of each part of the model."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from common.evaluation.merging_overlay import patch_groups, recorded_merging, resize_to_side, token_counts
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

PROMPT_CHARACTERS = 10_000  # checked before the prompt is tokenised: 20 MB take 26 s
# A visitor who presses Stop may leave a thread behind. Hooks belong to the model, so they would record both threads.
_MERGING_LOCK = Lock()


@dataclass
class Merging:
    """The frames of an image or a video and their merging, as the page shows them.

    Attributes:
        frames: The image, or the sampled frames of a video, as they are drawn.
        groups: Before the connector and after each of its layers, the token that each patch belongs to, of shape
            `(side, side)`. Empty before the model has run.
        counts: Number of tokens before the connector and after each of its layers.
    """

    frames: list[Image.Image]
    groups: list[np.ndarray] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class StopOnEvent(StoppingCriteria):
    """Ends generation when `event` is set."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@contextmanager
def timed(milliseconds: dict[str, float], part: str, device: torch.device) -> Iterator[None]:
    """Stores in `milliseconds[part]` how long the block takes."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    milliseconds[part] = 1e3 * (time.perf_counter() - start)


def stream_text(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    milliseconds: dict[str, float],
) -> Iterator[str]:
    """Generates text and yields it as it grows; with several beams it yields only the whole text.

    Args:
        model, processor: The captioner.
        inputs: Arguments of `generate` for one prompt, including `input_ids`.
        settings: From [`generation_settings`].
        milliseconds: Receives the time of the `"language model"` at the end.

    Raises:
        Exception: Whatever `generate` raises.
    """

    def generate(**arguments: Any) -> torch.Tensor:
        with timed(milliseconds, "language model", model.device):
            return model.generate(**inputs, **settings, **arguments)

    if settings["num_beams"] > 1:
        yield processor.decode(generate()[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, text = Event(), ""
    with ThreadPoolExecutor(max_workers=1) as executor:
        generation = executor.submit(generate, streamer=streamer, stopping_criteria=[StopOnEvent(stop)])
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
    """Checks the visitor's options and returns them as arguments of `generate`.

    Args:
        num_beams: Number of beams, 1 or more.
        temperature: Temperature of sampling, above 0; 0 takes the likeliest token.
        top_p: Probability of the likeliest tokens that are sampled from, above 0, at most 1.
        max_new_tokens: Largest number of generated tokens, 1 or more.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is not a number.
    """
    options = {"num_beams": num_beams, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    for name, value in options.items():  # through the API they may be anything that JSON holds
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"`{name}` must be a number, but is {value!r}.")
    for name, fits, wanted in (
        ("num_beams", num_beams >= 1 and num_beams % 1 == 0, "a whole number of 1 or more"),
        ("temperature", 0 <= temperature < math.inf, "0 or more"),
        ("top_p", 0 < top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", max_new_tokens >= 1 and max_new_tokens % 1 == 0, "a whole number of 1 or more"),
    ):
        if not fits:
            raise ValueError(f"`{name}` must be {wanted}, but is {options[name]}.")
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    lengths = {"num_beams": int(num_beams), "max_new_tokens": int(max_new_tokens)}
    return {**lengths, "do_sample": temperature > 0, **sampling}


@torch.no_grad()
def describe(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    modality: str,
    frames: list[Image.Image],
    prompt: str,
    settings: dict[str, Any],
) -> Iterator[tuple[str, Merging, dict[str, float]]]:
    """Runs the captioner part by part.

    Args:
        model, processor: The captioner.
        modality, frames: From [`read_file`].
        prompt: The prompt; may be empty.
        settings: From [`generation_settings`].

    Yields:
        The text so far, the merging, and the milliseconds of `"tower"`, `"connector"` and, at the end,
        `"language model"`. The first text is empty.

    Raises:
        ValueError: If the prompt is too long, or its placeholders and the images differ in number.
    """
    if len(prompt) > PROMPT_CHARACTERS:
        raise ValueError(f"The prompt has {len(prompt)} characters, but at most {PROMPT_CHARACTERS} are read.")
    inputs = processor(**{modality: frames}, text=prompt).to(model.device)
    pixel_values = inputs.pop("pixel_values" if modality == "images" else "pixel_values_videos")
    milliseconds: dict[str, float] = {}
    with _MERGING_LOCK:
        with timed(milliseconds, "tower", model.device):
            vision_features = model.get_vision_features(pixel_values)
        with timed(milliseconds, "connector", model.device), recorded_merging(model) as layers:
            soft_prompt = model.project_vision_features(vision_features)
    unmerged = torch.arange(model.config.num_vision_tokens)[None]  # (1, num_vision_tokens)
    layers = [unmerged, *layers]
    merging = Merging([resize_to_side(frame) for frame in frames], patch_groups(model, layers), token_counts(layers))
    yield "", merging, milliseconds
    inputs = {**inputs, "mm_encoder_outputs": {modality.removesuffix("s"): soft_prompt}}
    text = ""
    for text in stream_text(model, processor, inputs, settings, milliseconds):
        yield text, merging, milliseconds
    yield text, merging, milliseconds
