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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from app_model import PROMPT_CHARACTERS, SHOWN_FRAMES, Merging, describe, generation_settings
from app_uploads import MB, read_file
from PIL import Image

from common.evaluation.merging_overlay import SIDE, draw_groups, layer_names, patch_grid
from common.models import load_captioner
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor
from processing_evlgen.videos import sample_frames

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: no telemetry, no check for newer versions
import gradio as gr

QUEUE_SIZE = 16  # requests that may wait; one is served at a time
SESSIONS = 64  # visitors whose frames are kept in memory, for the slider


def draw_layer(merging: Merging | None, layer: int) -> list[tuple[Image.Image, str]]:
    """Returns each frame with a title and, once the model has run, the frame with a layer's tokens drawn over it."""
    if merging is None:
        return []
    if merging.groups and layer not in range(len(merging.groups)):  # through the API it may be 1.5
        raise ValueError(f"`layer` must be a whole number of 0 to {len(merging.groups) - 1}, but is {layer!r}.")
    drawn = []
    for number, frame in enumerate(merging.frames, start=1):
        name = "image" if len(merging.frames) == 1 else f"frame {number}"
        drawn.append((frame, name))
        if merging.groups:
            title = f"{name}, layer {layer}: {merging.counts[int(layer)]} tokens"
            groups = merging.groups[int(layer)]
            drawn.append((draw_groups(frame, groups if groups.ndim == 2 else groups[number - 1]), title))
    return drawn


def figures(merging: Merging, milliseconds: dict[str, float]) -> str:
    """Returns a Markdown table of tokens and of the milliseconds of each part."""
    frames = merging.num_frames
    cells = {
        "vision tokens": f"{merging.counts[0]}" if frames == 1 else f"{frames} frames x {merging.counts[0]}",
        "soft-prompt tokens": f"{merging.num_image_tokens}",
    }
    for part in ("tower", "connector", "language model"):
        cells[part] = f"{milliseconds[part]:.1f} ms" if part in milliseconds else "…"
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
    """Accepts uploaded files only. Gradio would also fetch a URL, whatever the size of its content."""
    move = file.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if path is not None and str(path).startswith(("http://", "https://")):
            raise gr.Error("Files are uploaded; URLs are not fetched.", print_exception=False)
        return await move(path)

    file.async_move_resource_to_block_cache = move_upload
    return file


def read_upload(path: str | None, processor: EVLGenProcessor, max_mb: float) -> tuple[str, list[Image.Image]]:
    """Reads an uploaded file as [`read_file`] does, and deletes a file that is refused."""
    if path is None:
        raise ValueError("There is no image or video yet.")
    try:
        return read_file(path, processor.num_frames, max_mb, processor.fps)
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
    def preview(path: str | None) -> tuple[Merging | None, list, str, str]:
        if path is None:
            return None, [], "", ""
        _, frames = read_upload(path, processor, max_mb)
        merging = Merging([make_preview(frames[index]) for index in sample_frames(len(frames), SHOWN_FRAMES)])
        return merging, draw_layer(merging, 0), "", ""

    def answer(
        path: str | None, prompt: str | None, layer: int, num_tokens: int, *options: Any
    ) -> Iterator[tuple[Any, ...]]:
        with shown_errors():  # as a decorator it would end before the first step
            settings = generation_settings(*options)
            modality, frames = read_upload(path, processor, max_mb)
            drawn = None
            steps = describe(model, processor, modality, frames, prompt or "", settings, num_tokens)
            for text, merging, milliseconds in steps:
                drawn = draw_layer(merging, layer) if drawn is None else gr.skip()
                yield text, figures(merging, milliseconds), merging, drawn

    with gr.Blocks(title="EVLGen", delete_cache=(3600, 3600)) as page:
        merging = gr.State()
        with gr.Row():
            with gr.Column():
                file, prompt, start, stop, options = input_column(max_mb, model.generation_config.max_new_tokens)
                low, high = model.config.image_token_range or [processor.num_image_tokens] * 2
                texts = {"label": "Tokens of the soft prompt", "info": "Fewer are faster, more show more."}
                shown = {"visible": low < high, "elem_id": "tokens"}
                num_tokens = gr.Slider(low, max(high, low + 1), processor.num_image_tokens, step=1, **texts, **shown)
            with gr.Column(scale=2):
                text, table, layer, gallery = output_column(names)
        file.change(preview, file, [merging, gallery, text, table])
        layer.release(shown_errors()(draw_layer), [merging, layer], gallery)
        inputs, outputs = [file, prompt, layer, num_tokens, *options], [text, table, merging, gallery]
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
        gr.Slider(1, 10, 1, step=1, label="Beams", info="Text is streamed with 1."),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token."),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="For temperatures above 0."),
        gr.Slider(1, 256, min(max_new_tokens or 30, 256), step=1, label="Max new tokens"),
    ]
    return file, prompt, start, stop, options


def output_column(names: list[str]) -> tuple[gr.Textbox, gr.Markdown, gr.Slider, gr.Gallery]:
    """Creates the outputs: text, figures, the slider of layers, and the gallery of frames."""
    text = gr.Textbox(label="Text", elem_id="text", interactive=False)
    table = gr.Markdown(elem_id="figures")
    info = "0 is before the choice of tokens, 1 after it." if "choice" in names else "0 is before the first layer."
    shown = {"label": "Layer of the connector", "info": info, "elem_id": "layer"}
    layer = gr.Slider(0, len(names), len(names), step=1, **shown)
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
        max_file_size=int(MB * arguments.max_mb),
        show_error=True,
        run_history=False,
        state_session_capacity=SESSIONS,
        footer_links=[],
    )


if __name__ == "__main__":
    main()
