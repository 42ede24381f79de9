"""Draws which patches of an image or a video become which token of the soft prompt, layer by layer.

    python examples/visualize_merging.py --model outputs/demo --images a.png b.png --output merging.png
    python examples/visualize_merging.py --model outputs/demo-video --videos video.mp4 --output merging.png
    python examples/visualize_merging.py --model outputs/demo --images a.png --words --output words.png

Each row shows an image as the model receives it, and its patches after each layer of the connector. Patches of one
token share a colour. Where there are at most 32 tokens, they also share a number, the token's position after that
layer. After a TomeFormer's last layer it is the position in the soft prompt. For a Q-Former that chooses, "choice"
shows the tokens that the queries attend to.

The frames of a video are averaged to one set of tokens before the connector, so they share one merging. It is drawn
over each of them. With `video_mode` "merge" a token lives through some frames: it has its colour in each of them.
`--words` draws the words that the model writes, with their places, and works with any connector (docs/words.md).
`--model` may be an adapter's folder, from finetune.py. Videos need `.[video]`.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common.evaluation.merging_overlay import (
    SIDE,
    draw_groups,
    draw_words,
    layer_names,
    resize_to_side,
    trace_merging,
)
from common.models import load_captioner
from common.processes import run_script
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.explanations import explain_sequences, generate_once
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import load_rgb_image
from processing_evlgen.videos import load_rgb_frames

GAP, TITLE = 16, 32  # pixels between panels, and above each

Panel = tuple[str, Image.Image]  # a title, and an image of SIDE x SIDE pixels


def panels_of(
    model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, modality: str, source: str, words: bool = False
) -> list[list[Panel]]:
    """Draws an image (`"images"`) or a video's frames (`"videos"`), and their tokens after each layer, or words."""
    if modality == "images":
        frames, names = [load_rgb_image(source)], ["image"]
        inputs = processor(images=frames)
    else:
        frames = load_rgb_frames(source, **processor.video_processor.frames)
        places = [f"frame {number} of {len(frames)}" for number in range(1, len(frames) + 1)]
        names = [f"{place}, {seconds:.1f} s" for place, seconds in zip(places, frames.times, strict=True)]
        inputs = processor(videos=[frames], do_sample_frames=False)
    if words:
        generated, sequences = generate_once(model, inputs.to(model.device), do_sample=False)
        (found,) = explain_sequences(model, processor, generated, sequences)
        drawn = [draw_words(resize_to_side(frame), found, number) for number, frame in enumerate(frames)]
        return [[(name, panel)] for name, panel in zip(names, drawn, strict=True)]
    _, merging = trace_merging(model, inputs.to(model.device), processor.num_image_tokens)
    rows = []
    for number, (frame, name) in enumerate(zip(frames, names, strict=True)):
        patches = " x ".join(map(str, merging.of_frame(0, number).shape))
        image = resize_to_side(frame)
        panels = [(f"{name}, {patches} patches", image)]
        for layer, title in enumerate(layer_names(model), start=1):
            drawn = draw_groups(image, merging.of_frame(layer, number))
            panels.append((f"{title}: {merging.counts[layer]} tokens", drawn))
        rows.append(panels)
    return rows


def draw_rows(rows: list[list[Panel]], path: Path) -> None:
    """Draws one row for each image and for each frame of a video, one column for each layer, to a PNG file."""
    height = TITLE + rows[0][0][1].height + GAP
    size = (len(rows[0]) * (SIDE + GAP) - GAP, len(rows) * height - GAP)
    drawing = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(drawing), ImageFont.load_default(size=0.65 * TITLE)
    for number, row in enumerate(rows):
        top = number * height
        for column, (title, panel) in enumerate(row):
            left = column * (SIDE + GAP)
            draw.text((left + SIDE / 2, top + TITLE / 2), title, "black", font, anchor="mm")
            drawing.paste(panel, (left, top + TITLE))
    drawing.save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo", help="Captioner: a folder or a name on the Hub.")
    parser.add_argument("--images", nargs="+", default=[], help="Images: paths or URLs.")
    parser.add_argument("--videos", nargs="+", default=[], help="Videos: paths or URLs.")
    parser.add_argument(
        "--num_image_tokens", type=int, help="Tokens after the last layer. Default: the model's number."
    )
    parser.add_argument("--words", action="store_true", help="Draw words and their places instead of the merging.")
    parser.add_argument("--output", type=Path, help="PNG file to write. Default: merging.png or words.png.")
    arguments = parser.parse_args(argv)
    if not arguments.images and not arguments.videos:
        parser.error("at least one of --images and --videos must be given")
    model = load_captioner(arguments.model)
    own = {} if arguments.num_image_tokens is None else {"num_image_tokens": arguments.num_image_tokens}
    processor = EVLGenProcessor.from_pretrained(arguments.model, **own)
    sources = [("images", path) for path in arguments.images] + [("videos", path) for path in arguments.videos]
    drawn = (panels_of(model, processor, *source, words=arguments.words) for source in sources)
    output = arguments.output or Path("words.png" if arguments.words else "merging.png")
    draw_rows([row for rows in drawn for row in rows], output)
    print(f"Drew {len(arguments.images)} images and {len(arguments.videos)} videos to {output}.")


if __name__ == "__main__":
    run_script(main)
