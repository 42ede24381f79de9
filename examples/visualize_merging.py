"""Draws which patches of an image or a video become which token of the soft prompt, layer by layer.

    python examples/visualize_merging.py --model outputs/demo --images a.png b.png --output merging.png
    python examples/visualize_merging.py --model outputs/demo-video --videos video.mp4 --output merging.png

Each row shows an image as the model receives it, and its patches after each layer of the connector. Patches of one
token share a colour and a number, the token's position after that layer. After a TomeFormer's last layer it is the
position in the soft prompt. For a Q-Former that chooses, "choice" shows the tokens that the queries attend to.

The frames of a video are averaged to one set of tokens before the connector, so they share one merging. It is drawn
over each of them. With `video_mode` "merge" a token lives through some frames: it has its number and its colour in
each of them. `--model` may be an adapter's folder, from finetune.py. Videos need `.[video]`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.evaluation.merging_overlay import (
    SIDE,
    draw_groups,
    layer_names,
    merged_tokens,
    patch_groups,
    resize_to_side,
    token_counts,
)
from common.models import load_captioner
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import load_rgb_image
from processing_evlgen.videos import load_rgb_frames

GAP, TITLE = 16, 32  # pixels between panels, and above each


@dataclass
class Row:
    """An image or a frame of a video, and its merging in each layer."""

    image: Image.Image  # SIDE x SIDE pixels
    name: str
    groups: list[np.ndarray]  # (rows, columns) each, the token that each patch is part of
    counts: list[int]  # tokens after the layer


def image_row(model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, source: str) -> Row:
    """Computes the row of an image. The source is a path or a URL."""
    image = load_rgb_image(source)
    batch = processor(images=image).to(model.device)
    grid = batch.get("image_grid_thw")
    layers = merged_tokens(model, batch["pixel_values"], grid, num_image_tokens=processor.num_image_tokens)
    tiles = (1, 1) if grid is None else tuple(grid[0, 1:].tolist())
    return Row(resize_to_side(image), "image", patch_groups(model, layers, tiles), token_counts(layers))


def video_rows(model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, source: str) -> list[Row]:
    """Computes a row for each sampled frame of a video. The source is a path or a URL."""
    choice = {"num_frames": processor.num_frames} if processor.fps is None else {"fps": processor.fps}
    frames = load_rgb_frames(source, **choice)
    inputs = processor(videos=[frames], do_sample_frames=False).to(model.device)
    pixels, times = inputs["pixel_values_videos"], inputs["frame_times"]
    layers = merged_tokens(model, pixels, frame_times=times, num_image_tokens=processor.num_image_tokens)
    groups, counts = patch_groups(model, layers), token_counts(layers)
    rows = []
    for number, (frame, seconds) in enumerate(zip(frames, frames.times, strict=True)):
        of_frame = [group if group.ndim == 2 else group[number] for group in groups]
        name = f"frame {number + 1} of {len(frames)}, {seconds:.1f} s"
        rows.append(Row(resize_to_side(frame), name, of_frame, counts))
    return rows


def draw_merging(
    model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, images: list[str], videos: list[str], path: Path
) -> None:
    """Draws one row for each image and for each frame of a video, one column for each layer, to a PNG file."""
    rows = [image_row(model, processor, image) for image in images]
    for video in videos:
        rows += video_rows(model, processor, video)
    size = ((1 + len(rows[0].groups)) * (SIDE + GAP) - GAP, len(rows) * (TITLE + SIDE + GAP) - GAP)
    drawing = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(drawing), ImageFont.load_default(size=0.65 * TITLE)
    for number, row in enumerate(rows):
        patches = " x ".join(map(str, row.groups[0].shape))
        panels = [(f"{row.name}, {patches} patches", row.image)]
        for name, groups, count in zip(layer_names(model), row.groups, row.counts, strict=True):
            panels.append((f"{name}: {count} tokens", draw_groups(row.image, groups)))
        top = number * (TITLE + SIDE + GAP)
        for column, (title, panel) in enumerate(panels):
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
    parser.add_argument("--output", type=Path, default=Path("merging.png"), help="PNG file to write.")
    arguments = parser.parse_args(argv)
    if not arguments.images and not arguments.videos:
        parser.error("at least one of --images and --videos must be given")
    model = load_captioner("model", EVLGenForConditionalGeneration.from_pretrained, arguments.model)
    own = {} if arguments.num_image_tokens is None else {"num_image_tokens": arguments.num_image_tokens}
    processor = EVLGenProcessor.from_pretrained(arguments.model, **own)
    draw_merging(model, processor, arguments.images, arguments.videos, arguments.output)
    print(f"Drew {len(arguments.images)} images and {len(arguments.videos)} videos to {arguments.output}.")


if __name__ == "__main__":
    main()
