"""Pictures of a training run: its loss curve, and held-out pictures with what the model says about them."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
from PIL import Image

RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_loss_curve(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Draws training loss, and held-out loss where there is any, against steps.

    Args:
        log_history: The Trainer's `state.log_history`; losses in nats per token.
        path: The PNG file to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held-out")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, label=label)
    axes.set(xlabel="step", ylabel="caption loss [nats per token]", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_contact_sheet(
    images: list[Image.Image], references: list[str], captions: list[str], path: str | Path, columns: int = 4
) -> None:
    """Draws pictures with the generated caption below, green where it is the true one, else red with the true one.

    Args:
        images, references, captions: One of each for every picture.
        path: The PNG file to write.
        columns: Pictures in a row.
    """
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 3.1 * rows), layout="constrained", squeeze=False
    )
    for panel in axes.flat:
        panel.axis("off")
    for panel, image, reference, caption in zip(axes.flat, images, references, captions, strict=False):
        panel.imshow(image)
        right = caption == reference
        text = caption if right else f"{caption}\n(true: {reference})"
        wrapped = "\n".join(textwrap.fill(line, 30) for line in text.splitlines())
        panel.set_title(wrapped, fontsize=8.5, color=RIGHT if right else WRONG, y=-0.02, va="top")
    figure.savefig(path, dpi=110)
    plt.close(figure)
