"""Starts a fresh vision projection from the statistics of the tower's features, measured on training images."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from common.data.collator import CaptionCollator, EmptyBatchError
from common.data.data_arguments import DataArguments
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor


def whiten_vision_projection(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    rows: Any,
    data_args: DataArguments,
    num_images: int,
) -> None:
    """Whitens the vision projection of a fresh model; with 0 images it stays as it is.

    Measures rows at equal distances of a data set, and the first rows of a stream, without augmentation.
    """
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
        elif "pixel_values" in batch:
            yield model.get_vision_features(batch["pixel_values"])
        else:
            yield model.get_vision_features(batch["pixel_values_videos"], frame_times=batch["frame_times"])
