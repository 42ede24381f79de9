"""A page in the browser: an image or a video in; text, the merged patches and the cost of each part out.

    python examples/app.py --model outputs/demo

The server is reached from this machine only, unless `--host` says otherwise. Beside a model that is to come from the
Hub, nothing is fetched from or told to any other machine, by the server or by the page. Needs `.[app]`. `--model` may
be an adapter's folder, from finetune.py. A model whose connector is no TomeFormer merges nothing and is refused.

A Space on the Hub is the same script beside what it imports and the model; `examples/space` has its `requirements.txt`
and its `README.md`, whose first lines tell the Hub the versions of Gradio and Python and the file to start:

    mkdir -p my-space/outputs
    cp -r examples/app*.py examples/common examples/space/* *_evlgen my-space
    cp -r outputs/demo my-space/outputs
    hf upload you/my-space my-space --repo-type space

For a model that is on the Hub already, leave the third line out and set the Space's variable `EVLGEN_MODEL` to its
name.
"""

import argparse
import html
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import torch
from app_uploads import MB, read_file
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from common.evaluation.merging_overlay import (
    draw_groups,
    patch_grid,
    patch_groups,
    recorded_merging,
    resize_to_side,
    token_counts,
)
from common.models import load_captioner
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no telemetry, no look for newer versions
import gradio as gr

WAITING = 16  # requests that may wait; one is served at a time
VISITORS = 64  # whose images are kept in memory, for the slider
# One at a time: who presses Stop may leave a thread behind, and hooks and a video's frames are the model's own state.
_SEEING = Lock()


@dataclass
class Merging:
    """What the page shows of an image or a video.

    Attributes:
        frames: The image, or the frames that the model sees of a video, as they are drawn.
        groups: Before the connector and behind each of its layers `(side, side)`, the token that each patch is part
            of. Empty where nothing has been merged yet.
        counts: How many tokens there are, likewise.
    """

    frames: list[Image.Image]
    groups: list[np.ndarray] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class Stopped(StoppingCriteria):
    """Ends generation when `event` is set."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@contextmanager
def timed(milliseconds: dict[str, float], part: str, device: torch.device) -> Iterator[None]:
    """Writes down how long a part of the model takes."""
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
    """What the model says, longer and longer; with several beams only the whole text.

    Args:
        model, processor: The captioner.
        inputs: Arguments of `generate` for one prompt, its `input_ids` among them.
        settings: What [`generation_settings`] gives.
        milliseconds: Is given those of the `"language model"` at the end.

    Raises:
        Exception: Whatever `generate` raises.
    """

    def speak(**arguments: Any) -> torch.Tensor:
        with timed(milliseconds, "language model", model.device):
            return model.generate(**inputs, **settings, **arguments)

    if settings["num_beams"] > 1:
        yield processor.decode(speak()[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, text = Event(), ""
    with ThreadPoolExecutor(max_workers=1) as executor:
        words = executor.submit(speak, streamer=streamer, stopping_criteria=[Stopped(stop)])
        # A `generate` that fails would leave the streamer open.
        words.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))
        try:
            for piece in streamer:
                text += piece
                yield text.strip()
            words.result()
        finally:  # also when the visitor has gone
            stop.set()


def generation_settings(num_beams: int, temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate`.

    Args:
        num_beams: Beams to search with, 1 or more.
        temperature: Of sampling, above 0; at 0 the likeliest words are taken.
        top_p: Words to draw from: the likeliest ones that have this probability together, above 0, at most 1.
        max_new_tokens: Where to stop at the latest, 1 or more.

    Raises:
        ValueError: If one of them is out of range.
    """
    for name, value, fits, wanted in (
        ("num_beams", num_beams, num_beams >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
    ):
        if not fits:
            raise ValueError(f"`{name}` must be {wanted}, but is {value}.")
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    return {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": temperature > 0, **sampling}


@torch.no_grad()
def describe(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    kind: str,
    frames: list[Image.Image],
    prompt: str,
    settings: dict[str, Any],
) -> Iterator[tuple[str, Merging, dict[str, float]]]:
    """Runs the captioner part by part.

    Args:
        model, processor: The captioner.
        kind, frames: What [`read_file`] gives.
        prompt: What to say about it; may be empty.
        settings: What [`generation_settings`] gives.

    Yields:
        The text so far, the merging, and the milliseconds of `"tower"`, `"connector"` and, at the end,
        `"language model"`. The first text is empty.

    Raises:
        ValueError: If the prompt holds more placeholders than there are images, or is too long.
    """
    inputs = processor(**{kind: frames}, text=prompt).to(model.device)
    pixel_values = inputs.pop("pixel_values" if kind == "images" else "pixel_values_videos")
    milliseconds: dict[str, float] = {}
    with _SEEING:
        with timed(milliseconds, "tower", model.device):
            vision_features = model.get_vision_features(pixel_values)
        with timed(milliseconds, "connector", model.device), recorded_merging(model) as layers:
            soft_prompt = model.project_vision_features(vision_features)
    unmerged = torch.arange(model.config.num_vision_tokens)[None]  # (1, num_vision_tokens)
    layers = [unmerged, *layers]
    merging = Merging([resize_to_side(frame) for frame in frames], patch_groups(model, layers), token_counts(layers))
    yield "", merging, milliseconds
    inputs = {**inputs, "mm_encoder_outputs": {kind.removesuffix("s"): soft_prompt}}
    text = ""
    for text in stream_text(model, processor, inputs, settings, milliseconds):
        yield text, merging, milliseconds
    yield text, merging, milliseconds


def draw_layer(merging: Merging | None, layer: int) -> list[tuple[Image.Image, str]]:
    """Each frame with a caption, and, if it has been merged, what a layer of the connector leaves of it."""
    if merging is None:
        return []
    drawn = []
    for number, frame in enumerate(merging.frames, start=1):
        name = "image" if len(merging.frames) == 1 else f"frame {number}"
        drawn.append((frame, name))
        if merging.groups:
            caption = f"{name}, layer {layer}: {merging.counts[layer]} tokens"
            drawn.append((draw_groups(frame, merging.groups[layer]), caption))
    return drawn


def figures(merging: Merging, milliseconds: dict[str, float]) -> str:
    """Numbers of tokens and milliseconds of each part, as a table in Markdown."""
    frames = len(merging.frames)
    cells = {
        "vision tokens": f"{merging.counts[0]}" if frames == 1 else f"{frames} frames x {merging.counts[0]}",
        "soft-prompt tokens": f"{merging.counts[-1]}",
    }
    for part in ("tower", "connector", "language model"):
        cells[part] = f"{milliseconds[part]:.1f} ms" if part in milliseconds else "…"
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells, ["---"] * len(cells), cells.values()))


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows what goes wrong in the page, as text; what is no fault of the visitor's is logged as well."""
    try:
        yield
    except Exception as error:
        expected = isinstance(error, ValueError | TypeError)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        raise gr.Error(html.escape(message), duration=20, print_exception=not expected) from error


def uploads_only(file: gr.File) -> gr.File:
    """Takes files from the visitor's browser alone: Gradio would fetch a URL as well, whatever its size."""
    move = file.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if path is not None and str(path).startswith(("http://", "https://")):
            raise gr.Error("Files are uploaded; URLs are not fetched.", print_exception=False)
        return await move(path)

    file.async_move_resource_to_block_cache = move_upload
    return file


def build_page(model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, max_mb: float) -> gr.Blocks:
    """The page, to be launched.

    Args:
        model, processor: The captioner.
        max_mb: The largest file that is read, in MB of 2^20 bytes.

    Raises:
        ValueError: If the connector is no TomeFormer, or the tower's patches are no square.
    """
    patch_grid(model)
    with recorded_merging(model):  # refuses other connectors
        num_layers = model.config.connector_config.num_hidden_layers

    def look(path: str | None) -> tuple[Merging | None, list, str, str]:
        with shown_errors():
            merging = None if path is None else Merging(read_file(path, processor.num_frames, max_mb)[1])
            return merging, draw_layer(merging, 0), "", ""

    def answer(path: str | None, prompt: str, layer: int, *options: Any) -> Iterator[tuple[Any, ...]]:
        with shown_errors():
            if path is None:
                raise ValueError("There is no image or video yet.")
            kind, frames = read_file(path, processor.num_frames, max_mb)
            drawn = None
            settings = generation_settings(*options)
            for text, merging, milliseconds in describe(model, processor, kind, frames, prompt, settings):
                drawn = draw_layer(merging, layer) if drawn is None else gr.skip()
                yield text, figures(merging, milliseconds), merging, drawn

    with gr.Blocks(title="EVLGen", delete_cache=(3600, 3600)) as page:
        merging = gr.State()
        with gr.Row():
            with gr.Column():
                file = uploads_only(
                    gr.File(label=f"Image or video, at most {max_mb:g} MB", elem_id="file", height=120)
                )
                prompt = gr.Textbox(label="Prompt", placeholder="none", elem_id="prompt")
                with gr.Row():
                    start = gr.Button("Describe", variant="primary", elem_id="start")
                    stop = gr.Button("Stop", elem_id="stop")
                beams = gr.Slider(1, 10, 1, step=1, label="Beams", info="Text is streamed with 1.")
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest words.")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Above temperature 0.")
                default = min(model.generation_config.max_new_tokens or 30, 256)
                max_new_tokens = gr.Slider(1, 256, default, step=1, label="Max new tokens")
            with gr.Column(scale=2):
                text = gr.Textbox(label="Text", elem_id="text", interactive=False)
                table = gr.Markdown(elem_id="figures")
                layer = gr.Slider(
                    0,
                    num_layers,
                    num_layers,
                    step=1,
                    label="Layer of the connector",
                    info="0: before any merging.",
                    elem_id="layer",
                )
                gallery = gr.Gallery(
                    label="Patches that have become one token share a number",
                    columns=2,
                    fit_columns=False,
                    height="auto",
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
        file.change(look, file, [merging, gallery, text, table])
        layer.release(draw_layer, [merging, layer], gallery)
        options = [beams, temperature, top_p, max_new_tokens]
        running = gr.on(
            [start.click, prompt.submit], answer, [file, prompt, layer, *options], [text, table, merging, gallery]
        )
        stop.click(None, cancels=running)
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=os.environ.get("EVLGEN_MODEL", "outputs/demo"),
        help="Captioner: a folder or a name on the Hub; by default $EVLGEN_MODEL or outputs/demo.",
    )
    parser.add_argument("--max_mb", type=float, default=50.0, help="Largest file to take, in MB of 2^20 bytes.")
    parser.add_argument("--host", help="Address to listen on; by default $GRADIO_SERVER_NAME or 127.0.0.1.")
    parser.add_argument("--port", type=int, help="Port; by default the first free one from 7860 on.")
    arguments = parser.parse_args(argv)
    if not arguments.max_mb > 0:
        parser.error(f"--max_mb must be above 0, but is {arguments.max_mb:g}")
    model = load_captioner("model", EVLGenForConditionalGeneration.from_pretrained, arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    page = build_page(model, EVLGenProcessor.from_pretrained(arguments.model), arguments.max_mb)
    page.launch(
        share=False,
        server_name=arguments.host,
        server_port=arguments.port,
        max_file_size=int(MB * arguments.max_mb),
        show_error=True,
        run_history=False,
        state_session_capacity=VISITORS,
        footer_links=[],
    )


if __name__ == "__main__":
    main()
