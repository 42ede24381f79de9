"""Drawings of a training run: the loss curve, and held-out images with their generated captions."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from datasets import Dataset
from PIL import Image

from common.data.data_arguments import DataArguments
from common.data.rows import open_media, true_captions
from common.demo.scenes import DEMO_CREDITS

matplotlib.use("Agg")  # draws into files, without a window
import matplotlib.pyplot as plt

RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_loss_curve(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Draws the training loss and any held-out loss of the Trainer's log against steps, into a PNG file."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held-out")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, label=label)
    axes.set(xlabel="step", ylabel="caption loss [nats per token]", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_contact_sheet(dataset: Dataset, captions: list[str], data_args: DataArguments, path: str | Path) -> None:
    """Draws the first 16 images with their generated captions: green if true, else red beside the true one."""
    shown = dataset.select(range(min(16, len(dataset))))
    columns = 4
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 3.1 * rows), layout="constrained", squeeze=False
    )
    for panel in axes.flat:
        panel.axis("off")
    for panel, row, caption in zip(axes.flat, shown, captions, strict=False):
        panel.imshow(_thumbnail(row, data_args))
        references = true_captions(row, data_args)
        right = caption in references
        text = caption if right else f"{caption}\n(true: {references[0]})"
        wrapped = "\n".join(textwrap.fill(line, 30) for line in text.splitlines())
        panel.set_title(
            wrapped, fontsize=8.5, color=RIGHT if right else WRONG, y=0, va="top", pad=-3, parse_math=False
        )
    if data_args.dataset in DEMO_CREDITS:  # the drawing is published with model cards
        figure.supxlabel(DEMO_CREDITS[data_args.dataset], fontsize=7, color="gray")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _thumbnail(row: dict[str, Any], data_args: DataArguments) -> Image.Image | np.ndarray:
    """An image as it is, or four frames of a video as a square."""
    media = open_media(row, data_args)
    if not data_args.video_column:
        return media[0] if isinstance(media, list) else media
    first, second, third, fourth = (np.asarray(media[index * len(media) // 4]) for index in range(4))
    return np.vstack([np.hstack([first, second]), np.hstack([third, fourth])])
