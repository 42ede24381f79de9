"""What `--cache_features true` saves of a training step, behind a ViT-S/16 with random weights.

    python -m benchmarks.cached_features

The demo's data, connector, language model and recipe, batches of 16, towers in float32 or `--dtype bfloat16`. A step
from images decodes and resizes them and runs the tower; a step from cached features reads those from disk. Both take
turns; medians are printed, and the loss of the same images both ways: features are computed in float32 and kept in
float16, while a step under bfloat16 autocast computes them in bfloat16. Also printed is how much of the batches is
padding, the most that sorting captions by length or packing them could save.
"""

import argparse
import tempfile
from collections.abc import Callable
from itertools import cycle

import pretrain
import torch
from torch.utils.data import Dataset
from transformers import CLIPImageProcessor, ViTConfig, ViTModel

from common.command_line import parse_arguments
from common.data.collator import CaptionCollator
from common.data.feature_cache import cache_splits
from common.data.loading import load_captions
from common.models import build_model

from .timing import take_turns

VIT_S = ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6)
NORM = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="Rounds over which medians are taken.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="Of the frozen towers.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps, losses, padding = prepare(folder, arguments.dtype)
        seconds = take_turns(steps, arguments.rounds, torch.device("cpu"))
    reference = seconds["images"]
    print(f"{torch.get_num_threads()} threads, {arguments.dtype} towers")
    print("| a step from | time | images/s | loss |\n|---|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value / reference:.2f} | {reference / value:.2f} x | {losses[name]:.4f} |")
    print(f"{padding:.1%} of the tokens are padding.")


def prepare(folder: str, dtype: str) -> tuple[dict[str, Callable[[], None]], dict[str, float], float]:
    """A training step from images and one from their cached features, the loss before any step, and the share of
    padding in a batch."""
    torch.manual_seed(0)
    ViTModel(VIT_S, add_pooling_layer=False).save_pretrained(folder)
    CLIPImageProcessor(size={"height": 224, "width": 224}, do_center_crop=False, **NORM).save_pretrained(folder)
    argv = ["--vision_model", folder, "--output_dir", folder, "--max_train_samples", "160", "--max_test_samples", "16"]
    argv += ["--dtype", dtype]
    models, text_format, data, _, training = parse_arguments(
        *pretrain.ARGUMENTS, argv=argv, recipe=pretrain.DEMO_RECIPE
    )
    models.connector_config["merge_r"] = [98, 49, 25]  # of 197 tokens
    train, test = load_captions(data, training.seed)
    model, processor = build_model(models, text_format)
    cached, _ = cache_splits(model, processor, train, test, data, training.seed)
    collator = CaptionCollator(processor, data, training=True, seed=training.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def batch_of(rows: Dataset, start: int) -> dict[str, torch.Tensor]:
        return collator([rows[start + row] for row in range(training.per_device_train_batch_size)])

    def loss(rows: Dataset, start: int) -> torch.Tensor:
        batch = batch_of(rows, start)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.train()(**batch).loss

    starts_of_batches = range(0, len(train), training.per_device_train_batch_size)

    def step(rows: Dataset) -> Callable[[], None]:
        starts = cycle(starts_of_batches)

        def run() -> None:
            loss(rows, next(starts)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    sources = {"images": train, "cached features": cached}
    with torch.no_grad():
        losses = {name: float(loss(rows, 0)) for name, rows in sources.items()}
    masks = [batch_of(cached, start)["attention_mask"] for start in starts_of_batches]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    return {name: step(rows) for name, rows in sources.items()}, losses, padding


if __name__ == "__main__":
    main()
