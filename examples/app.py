"""A page in the browser that captions an image or a video and shows which patches the connector merges.

    python examples/app.py --model outputs/demo

The page streams the text and lists tokens and milliseconds of each part of the model. The server listens on this
machine only, unless `--host` is given. Except for a model from the Hub, neither the server nor the page contacts
another machine. Needs `.[app]`. `--model` may be an adapter's folder, from finetune.py. The model's connector must be
a TomeFormer, or a Q-Former that chooses tokens: others have nothing to show.

A Space on the Hub consists of this script, the code that it imports, and the model. `examples/space` has the Space's
`requirements.txt` and its `README.md`. The first lines of that file give the Hub the versions of Gradio and Python and
the script to start:

    mkdir -p my-space/outputs
    cp -r examples/app*.py examples/common examples/space/* *_evlgen my-space
    cp -r outputs/demo my-space/outputs
    hf upload you/my-space my-space --repo-type space

If the model is on the Hub already, omit the third line and set the Space's variable `EVLGEN_MODEL` to its name.
"""

import argparse
import html
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from app_uploads import read_file
from PIL import Image
from transformers import TextIteratorStreamer

from common.evaluation.merging_overlay import (
    SIDE,
    Merging,
    draw_groups,
    layer_names,
    patch_grid,
    resize_to_side,
    timed,
    trace_merging,
)
from common.models import load_captioner
from common.processes import run_script
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: no telemetry, no check for newer versions
import gradio as gr

QUEUE_SIZE = 16  # requests that may wait; one is served at a time
SESSIONS = 64  # visitors whose frames are kept in memory, for the slider
SHOWN_FRAMES = 16  # of a video
WHOLE = {"step": 1, "precision": 0}  # of a slider; Gradio itself rounds the value on the server
PROMPT_CHARACTERS = 10_000  # checked before the prompt is tokenised: 20 MB take 26 s
# A visitor who presses Stop may leave a thread behind. Hooks belong to the model, so they would record both threads.
_MERGING_LOCK = Lock()


@dataclass
class Shown:
    """What the page shows of an image or video: some of its frames and, once the model has run, their merging."""

    frames: list[Image.Image]
    num_frames: int = 1  # with those that are not shown
    merging: Merging | None = None


def shown_frames(total: int) -> list[int]:
    """Indices of the frames that are shown, at equal distances."""
    count = min(total, SHOWN_FRAMES)
    return [index * total // count for index in range(count)]


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
    """Returns the sliders' values as arguments of `generate`. A temperature of 0 takes the likeliest token."""
    settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
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
) -> Iterator[tuple[str, Shown]]:
    """Runs the captioner part by part on the frames from [`read_file`], with [`generation_settings`].

    Yields the text so far, at first empty, and what is shown. At the end `merging.milliseconds` has an entry for the
    `"language model"` too. A ValueError names a prompt that is too long or does not fit the frames.
    """
    if len(prompt) > PROMPT_CHARACTERS:
        raise ValueError(f"The prompt has {len(prompt)} characters, but at most {PROMPT_CHARACTERS} are read.")
    budget = processor.num_image_tokens if num_image_tokens is None else num_image_tokens
    model.config.read_budgets("num_image_tokens", [budget], 1)  # raises out of range
    sampling = {"do_sample_frames": False} if modality == "videos" else {}
    inputs = processor(**{modality: frames}, text=prompt, num_image_tokens=budget, **sampling).to(model.device)
    numbers = shown_frames(len(frames))
    with _MERGING_LOCK:
        soft_prompt, merging = trace_merging(model, inputs, budget, numbers)
    shown = Shown([resize_to_side(frames[number]) for number in numbers], len(frames), merging)
    yield "", shown
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inputs["mm_encoder_outputs"] = {modality.removesuffix("s"): soft_prompt}
    text = ""
    for text in stream_text(model, processor, inputs, settings, merging.milliseconds):
        yield text, shown
    yield text, shown


def draw_layer(shown: Shown | None, layer: int) -> list[tuple[Image.Image, str]]:
    """Returns each frame with a title and, once the model has run, the frame with a layer's tokens drawn over it."""
    if shown is None:
        return []
    merging = shown.merging
    drawn = []
    for number, frame in enumerate(shown.frames):
        name = "image" if len(shown.frames) == 1 else f"frame {number + 1}"
        drawn.append((frame, name))
        if merging is not None:
            title = f"{name}, layer {layer}: {merging.counts[layer]} tokens"
            drawn.append((draw_groups(frame, merging.of_frame(layer, number)), title))
    return drawn


def figures(shown: Shown) -> str:
    """Returns a Markdown table of tokens and of the milliseconds of each part."""
    frames, merging = shown.num_frames, shown.merging
    cells = {
        "vision tokens": f"{merging.counts[0]}" if frames == 1 else f"{frames} frames x {merging.counts[0]}",
        "soft-prompt tokens": f"{merging.num_image_tokens}",
    }
    for part in ("tower", "connector", "language model"):
        cells[part] = f"{merging.milliseconds[part]:.1f} ms" if part in merging.milliseconds else "…"
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells, ["---"] * len(cells), cells.values()))


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows errors in the page, as text. Errors that the visitor has not caused are logged as well."""
    try:
        yield
    except Exception as error:
        expected = isinstance(error, ValueError | TypeError)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        raise gr.Error(html.escape(message), duration=20, print_exception=not expected) from error


def uploads_only(file: gr.File) -> gr.File:
    """Refuses URLs, which Gradio would fetch before any function of a page; it has no setting against that."""
    move = file.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if path is not None and str(path).startswith(("http://", "https://")):
            raise gr.Error("Files are uploaded; URLs are not fetched.", print_exception=False)
        return await move(path)

    file.async_move_resource_to_block_cache = move_upload
    return file


def make_slider(low: float, high: float, value: float, label: str, **layout: Any) -> gr.Slider:
    """A slider that refuses what only a client without the page can send. Gradio's own errors do not name a slider."""
    slider = gr.Slider(low, high, value, label=label, **layout)
    preprocess = slider.preprocess

    def check(given: float) -> float:
        if type(given) not in (int, float) or not low <= given <= high:
            wanted = f"{label!r} must be a number from {low:g} to {high:g}"
            raise gr.Error(html.escape(f"{wanted}, but is {str(given)[:100]!r}."), print_exception=False)
        return preprocess(given)

    slider.preprocess = check
    return slider


def read_upload(path: str | None, processor: EVLGenProcessor) -> tuple[str, list[Image.Image]]:
    """Reads an uploaded file as [`read_file`] does, and deletes a file that is refused."""
    if path is None:
        raise ValueError("There is no image or video yet.")
    try:
        videos = processor.video_processor
        return read_file(path, videos.num_frames, videos.fps)
    except ValueError:
        Path(path).unlink(missing_ok=True)  # Gradio itself would keep it for an hour
        raise


def make_preview(frame: Image.Image) -> Image.Image:
    """Returns a small copy: the page keeps frames in memory, and a PNG of 64 million pixels takes seconds."""
    frame = frame.copy()
    frame.thumbnail((2 * SIDE, 2 * SIDE))
    return frame


def build_page(model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, max_mb: float) -> gr.Blocks:
    """Builds the page for files of up to `max_mb`. A ValueError names a connector or tower that it cannot show."""
    patch_grid(model)
    names = layer_names(model)

    @shown_errors()
    def preview(path: str | None) -> tuple[Shown | None, list, str, str]:
        if path is None:
            return None, [], "", ""
        _, frames = read_upload(path, processor)
        shown = Shown([make_preview(frames[number]) for number in shown_frames(len(frames))])
        return shown, draw_layer(shown, 0), "", ""

    def answer(
        path: str | None, prompt: str | None, layer: int, num_tokens: int, *options: Any
    ) -> Iterator[tuple[Any, ...]]:
        with shown_errors():  # as a decorator it would end before the first step
            settings = generation_settings(*options)
            modality, frames = read_upload(path, processor)
            drawn = None
            steps = describe(model, processor, modality, frames, prompt or "", settings, num_tokens)
            for text, shown in steps:
                drawn = draw_layer(shown, layer) if drawn is None else gr.skip()
                yield text, figures(shown), shown, drawn

    with gr.Blocks(title="EVLGen", delete_cache=(3600, 3600)) as page:
        shown = gr.State()
        with gr.Row():
            with gr.Column():
                file, prompt, start, stop, options = input_column(max_mb, model.generation_config.max_new_tokens)
                low, high = model.config.image_token_range or [processor.num_image_tokens] * 2
                texts = {"label": "Tokens of the soft prompt", "info": "Fewer are faster, more show more."}
                layout = {"visible": low < high, "elem_id": "tokens", **WHOLE}
                num_tokens = make_slider(low, max(high, low + 1), processor.num_image_tokens, **texts, **layout)
            with gr.Column(scale=2):
                text, table, layer, gallery = output_column(names)
        file.change(preview, file, [shown, gallery, text, table])
        layer.release(shown_errors()(draw_layer), [shown, layer], gallery)
        inputs, outputs = [file, prompt, layer, num_tokens, *options], [text, table, shown, gallery]
        running = gr.on([start.click, prompt.submit], answer, inputs, outputs)
        stop.click(None, cancels=running)
    return page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)


def input_column(max_mb: float, max_new_tokens: int | None) -> tuple[Any, ...]:
    """Creates the inputs: file, prompt, the two buttons, and sliders in the order of [`generation_settings`]."""
    file = uploads_only(gr.File(label=f"Image or video, at most {max_mb:g} MB", elem_id="file", height=120))
    prompt = gr.Textbox(label="Prompt", placeholder="none", elem_id="prompt", max_length=PROMPT_CHARACTERS)
    with gr.Row():
        start = gr.Button("Describe", variant="primary", elem_id="start")
        stop = gr.Button("Stop", elem_id="stop")
    options = [
        make_slider(1, 10, 1, "Beams", info="Text is streamed with 1.", **WHOLE),
        make_slider(0, 2, 0, "Temperature", info="0 takes the likeliest token.", step=0.05),
        make_slider(0.05, 1, 1, "Top-p", info="For temperatures above 0.", step=0.05),
        make_slider(1, 256, min(max_new_tokens or 30, 256), "Max new tokens", **WHOLE),
    ]
    return file, prompt, start, stop, options


def output_column(names: list[str]) -> tuple[gr.Textbox, gr.Markdown, gr.Slider, gr.Gallery]:
    """Creates the outputs: text, figures, the slider of layers, and the gallery of frames."""
    text = gr.Textbox(label="Text", elem_id="text", interactive=False)
    table = gr.Markdown(elem_id="figures")
    info = "0 is before the choice of tokens, 1 after it." if "choice" in names else "0 is before the first layer."
    shown = {"label": "Layer of the connector", "info": info, "elem_id": "layer"}
    layer = make_slider(0, len(names), len(names), **WHOLE, **shown)
    layout = {"columns": 2, "fit_columns": False, "height": "auto", "buttons": ["download", "fullscreen"]}
    gallery = gr.Gallery(label="Patches of one token share a number", **layout, format="png", elem_id="gallery")
    return text, table, layer, gallery


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_model = os.environ.get("EVLGEN_MODEL", "outputs/demo")
    model_help = "Captioner: a folder or a name on the Hub. Default: $EVLGEN_MODEL or outputs/demo."
    parser.add_argument("--model", default=default_model, help=model_help)
    parser.add_argument("--max_mb", type=float, default=50.0, help="Largest file that is read, in MB of 2^20 bytes.")
    parser.add_argument("--host", help="Address to listen on. Default: $GRADIO_SERVER_NAME or 127.0.0.1.")
    parser.add_argument("--port", type=int, help="Port. Default: the first free one from 7860.")
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
        max_file_size=int(2**20 * arguments.max_mb),
        show_error=True,
        run_history=False,
        state_session_capacity=SESSIONS,
        footer_links=[],
    )


if __name__ == "__main__":
    run_script(main)
