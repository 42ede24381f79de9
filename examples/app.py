"""A page in the browser that captions an image or a video and shows which patches the connector merges.

    python examples/app.py --model outputs/demo

The page says what the model was trained on, streams the text, and lists tokens and milliseconds of each part of the
model. The images in `--examples` can be tried with a click. "Where does each word come from?" explains the text: a
word that is pointed at lights up its place, and doubtful words are underlined (docs/words.md). The server listens on
this machine only, unless `--host` is given. Except for a model from the Hub, neither the server nor the page contacts
another machine. Needs `.[app]`. `--model` may be an adapter's folder, from finetune.py. The model's connector must be
a TomeFormer, or a Q-Former that chooses tokens: others have nothing to show. docs/publish.md makes a Space of it.
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
from PIL import Image
from transformers import TextIteratorStreamer
from transformers.utils import cached_file

from common.evaluation.merging_overlay import (
    SIDE,
    Merging,
    draw_groups,
    layer_names,
    resize_to_side,
    timed,
    trace_merging,
    words_page,
)
from common.models import load_captioner
from common.processes import run_script
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.explanations import explain_sequences, patch_grid
from processing_evlgen import EVLGenProcessor

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: no telemetry, no check for newer versions
try:
    import gradio as gr
    from app_uploads import IMAGES, read_file
except ModuleNotFoundError as error:
    raise ImportError(f'The page needs {error.name}. Install it with: pip install -e ".[app]"') from error

QUEUE_SIZE = 16  # requests that may wait; one is served at a time
SESSIONS = 64  # visitors whose frames are kept in memory, for the slider
MAX_NEW_TOKENS = 256  # of the slider, and of a text whose words are explained
SHOWN_FRAMES = 16  # of a video
SHEET = "captions.png"  # held-out images with captions, which training leaves beside its model
# A gallery cuts off larger pictures.
NARROW = ".gradio-container { max-width: 1000px !important; margin: auto !important; }"
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


def light_up(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    modality: str,
    frames: list[Image.Image],
    prompt: str,
    text: str,
    num_image_tokens: int,
) -> str:
    """HTML of a text whose words light up their places; arguments as in [`describe`]."""
    if not 0 < len(text.strip()) <= PROMPT_CHARACTERS or len(prompt) > PROMPT_CHARACTERS:
        raise ValueError("There is no text yet, or it is too long.")
    sampling = {"do_sample_frames": False} if modality == "videos" else {}
    given = {"text": [prompt], "suffix": [text], "num_image_tokens": num_image_tokens, **sampling}
    sources = [frames] if modality == "videos" else frames
    inputs = processor(**{modality: sources}, **given).to(model.device)
    if (inputs["labels"] != -100).sum() > MAX_NEW_TOKENS + 1:  # with the end; each word is a backward pass
        raise ValueError(f"The text has more than {MAX_NEW_TOKENS} tokens.")
    with _MERGING_LOCK:
        (words,) = explain_sequences(model, processor, inputs, None)
    return words_page([resize_to_side(frame) for frame in frames], words)


def draw_layer(shown: Shown | None, layer: int) -> list[tuple[Image.Image, str]]:
    """Returns each frame with a layer's tokens drawn over it, and a title; nothing before the model has run."""
    if shown is None or shown.merging is None:
        return []
    merging, drawn = shown.merging, []
    for number, frame in enumerate(shown.frames):
        name = "image" if len(shown.frames) == 1 else f"frame {number + 1}"
        title = f"{name}, layer {layer}: {merging.counts[layer]} tokens"
        drawn.append((draw_groups(frame, merging.of_frame(layer, number)), title))
    return drawn


def figures(shown: Shown) -> str:
    """Returns a Markdown table of the tokens and the milliseconds of each part."""
    frames, merging = shown.num_frames, shown.merging
    seen = f"{merging.counts[0]}" if frames == 1 else f"{frames} frames x {merging.counts[0]}"
    rows = ["| part | tokens | ms |", "|---|---|---|"]
    for part, tokens in (("tower", seen), ("connector", merging.num_image_tokens), ("language model", "")):
        time = f"{merging.milliseconds[part]:.1f}" if part in merging.milliseconds else "…"
        rows.append(f"| {part} | {tokens} | {time} |")
    return "\n".join(rows)


def describe_model(model: EVLGenForConditionalGeneration, name: str) -> str:
    """A title in Markdown, and what the model was trained on."""
    config = model.config
    media = "videos and images" if config.is_for_videos else "images"
    data = ", ".join(f"`{data}`" for data in config.training_data or ())
    known = f"It was trained on {data}." if data else "Its training data is not named."
    warning = "Images of another kind get fluent but wrong text."
    tokens = f"The {config.num_vision_tokens} tokens of an image become {config.num_image_tokens}."
    return f"# EVLGen\n`{name}` captions {media}. {known} {warning} {tokens}"


def find_sheet(name: str) -> Image.Image | None:
    """The contact sheet of the model's training, if its folder or repository has one."""
    path = cached_file(name, SHEET, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Image.open(path)


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


def build_page(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    max_mb: float,
    name: str = "The model",
    sheet: Image.Image | None = None,
    examples: list[Path] | None = None,
) -> gr.Blocks:
    """Builds the page for files of up to `max_mb`. A ValueError names a connector or tower that it cannot show."""
    patch_grid(model)
    names = layer_names(model)

    @shown_errors()
    def preview(path: str | None) -> tuple[Shown | None, gr.Gallery, list, str, str]:
        if path is None:
            return None, gr.Gallery([], visible=False), [], "", ""
        _, frames = read_upload(path, processor)
        shown = Shown([make_preview(frames[number]) for number in shown_frames(len(frames))])
        return shown, gr.Gallery(shown.frames, columns=min(4, len(shown.frames)), visible=True), [], "", ""

    def answer(
        path: str | None, prompt: str | None, layer: int, num_tokens: int, *options: Any
    ) -> Iterator[tuple[Any, ...]]:
        with shown_errors():  # as a decorator it would end before the first step
            settings = generation_settings(*options)
            modality, frames = read_upload(path, processor)
            steps = describe(model, processor, modality, frames, prompt or "", settings, num_tokens)
            for step, (text, shown) in enumerate(steps):
                columns = min(2, len(shown.frames))
                drawn = gr.skip() if step else gr.Gallery(draw_layer(shown, layer), columns=columns)
                yield text, figures(shown), shown, drawn

    @shown_errors()
    def explain(path: str | None, prompt: str | None, text: str | None, num_tokens: int) -> str:
        return light_up(model, processor, *read_upload(path, processor), prompt or "", text or "", num_tokens)

    with gr.Blocks(title="EVLGen", delete_cache=(3600, 3600)) as page:
        shown = gr.State()
        gr.Markdown(describe_model(model, name))
        if sheet is not None:
            with gr.Accordion("What it knows: held-out images with its captions", open=False):
                gr.Image(sheet, show_label=False, interactive=False)
        with gr.Row():
            with gr.Column():
                file, picture, tries, prompt, start, stop = input_column(max_mb, examples or [])
                options = sampling_sliders(model.generation_config.max_new_tokens)
                low, high = model.config.image_token_range or [processor.num_image_tokens] * 2
                texts = {"label": "Tokens of the soft prompt", "info": "Fewer are faster, more show more."}
                layout = {"visible": low < high, "elem_id": "tokens", **WHOLE}
                num_tokens = make_slider(low, max(high, low + 1), processor.num_image_tokens, **texts, **layout)
            with gr.Column():
                text, words, table, layer, gallery = output_column(names)
        file.change(preview, file, [shown, picture, gallery, text, table])
        layer.release(shown_errors()(draw_layer), [shown, layer], gallery)
        inputs, outputs = [file, prompt, layer, num_tokens, *options], [text, table, shown, gallery]
        running = gr.on([start.click, prompt.submit], answer, inputs, outputs)
        stop.click(None, cancels=running)
        tries.click(lambda sample: sample[0], tries, file)
        words[0].click(explain, [file, prompt, text, num_tokens], words[1])
        text.change(None, None, words[1], js="() => ''")  # the words were those of another text
    return page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)


def input_column(max_mb: float, examples: list[Path]) -> tuple[Any, ...]:
    """Creates the inputs: file, its picture, images to try, prompt, and the two buttons."""
    file = uploads_only(gr.File(label=f"Image or video, at most {max_mb:g} MB", elem_id="file", height=120))
    picture = gr.Gallery(show_label=False, visible=False, height="auto", format="png", elem_id="picture", buttons=[])
    samples = [[str(path)] for path in examples]
    shown = {"label": "Or try one of these", "visible": bool(samples), "elem_id": "examples"}
    tries = gr.Dataset(components=[gr.Image(render=False)], samples=samples, **shown)
    prompt = gr.Textbox(label="Prompt", placeholder="none", elem_id="prompt", max_length=PROMPT_CHARACTERS)
    with gr.Row():
        start = gr.Button("Describe", variant="primary", elem_id="start")
        stop = gr.Button("Stop", elem_id="stop")
    return file, picture, tries, prompt, start, stop


def sampling_sliders(max_new_tokens: int | None) -> list[gr.Slider]:
    """Creates the folded sliders, in the order of [`generation_settings`]."""
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        return [
            make_slider(1, 10, 1, "Beams", info="Text is streamed with 1.", **WHOLE),
            make_slider(0, 2, 0, "Temperature", info="0 takes the likeliest token.", step=0.05),
            make_slider(0.05, 1, 1, "Top-p", info="For temperatures above 0.", step=0.05),
            make_slider(1, MAX_NEW_TOKENS, min(max_new_tokens or 30, MAX_NEW_TOKENS), "Max new tokens", **WHOLE),
        ]


def output_column(names: list[str]) -> tuple[gr.Textbox, list[Any], gr.Markdown, gr.Slider, gr.Gallery]:
    """Creates the outputs: text, button and HTML of its words, figures, the slider of layers, and drawn frames."""
    text = gr.Textbox(label="Text", elem_id="text", interactive=False)
    words = [gr.Button("Where does each word come from?", elem_id="explain"), gr.HTML(elem_id="words")]
    info = "0 is before the choice of tokens, 1 after it." if "choice" in names else "0 is before the first layer."
    info += " Patches of one token share a colour."
    shown = {"label": "Layer of the connector", "info": info, "elem_id": "layer"}
    layer = make_slider(0, len(names), len(names), **WHOLE, **shown)
    layout = {"fit_columns": False, "height": "auto", "buttons": ["download", "fullscreen"], "format": "png"}
    gallery = gr.Gallery(show_label=False, elem_id="gallery", **layout)
    table = gr.Markdown(elem_id="figures")
    return text, words, table, layer, gallery


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_model = os.environ.get("EVLGEN_MODEL", "outputs/demo")
    model_help = "Captioner: a folder or a name on the Hub. Default: $EVLGEN_MODEL or outputs/demo."
    parser.add_argument("--model", default=default_model, help=model_help)
    own = Path(__file__).with_name("images") / "try"
    parser.add_argument("--examples", type=Path, default=own, help="Folder of images to try: the first six are shown.")
    parser.add_argument("--max_mb", type=float, default=50.0, help="Largest file that is read, in MB of 2^20 bytes.")
    parser.add_argument("--host", help="Address to listen on. Default: $GRADIO_SERVER_NAME or 127.0.0.1.")
    parser.add_argument("--port", type=int, help="Port. Default: the first free one from 7860.")
    arguments = parser.parse_args(argv)
    if not arguments.max_mb > 0:
        parser.error(f"--max_mb must be above 0, but is {arguments.max_mb:g}")
    model = load_captioner(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor, sheet = EVLGenProcessor.from_pretrained(arguments.model), find_sheet(arguments.model)
    examples = sorted(path for path in arguments.examples.glob("*") if path.suffix.lower() in IMAGES)[:6]
    name = Path(arguments.model).resolve().name if Path(arguments.model).exists() else arguments.model
    page = build_page(model, processor, arguments.max_mb, name, sheet, examples)
    page.launch(
        allowed_paths=[str(path.resolve()) for path in examples],
        share=False,
        css=NARROW,
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
