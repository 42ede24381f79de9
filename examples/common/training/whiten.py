"""A fresh model that starts from the statistics of its vision tower, measured on the training images."""

from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from common.data.collator import CaptionCollator
from modeling_evlgen import EVLGenForConditionalGeneration


def whiten_vision_projection(
    model: EVLGenForConditionalGeneration, collator: CaptionCollator, rows: Any, num_images: int
) -> None:
    """Lets a fresh model start from the statistics of its vision tower.

    Args:
        model: Its vision projection is changed.
        collator: Reads and prepares images, without augmentation.
        rows: A data set or a stream of images, videos or cached vision features.
        num_images: How many of them to take: of a data set at equal distances, of a stream the first.

    Raises:
        ValueError: If a row is bad and not to be skipped, or none is left.
    """
    if hasattr(rows, "__len__"):
        places = range(0, len(rows), max(1, len(rows) // num_images))
        taken = (rows[place] for place in places[:num_images])
    else:
        taken = islice(rows, num_images)
    progress = tqdm(taken, total=num_images, desc="Whitening", unit="image", leave=False)
    features = (_vision_features(model, collator, row) for row in progress)
    model.whiten_vision_projection(one for one in features if one is not None)


def _vision_features(
    model: EVLGenForConditionalGeneration, collator: CaptionCollator, row: dict[str, Any]
) -> torch.Tensor | None:
    """Of a row's image, or images, or video: `(images, tokens, dim)`; None if it is bad and to be skipped."""
    if "vision_features" in row:
        return torch.tensor(row["vision_features"][:1])  # of several views the first
    image = collator.read(row)
    if image is None:
        return None
    if not collator.arguments.video_column:
        return model.get_vision_features(collator.processor(images=image)["pixel_values"].to(model.device))
    video = collator.processor(videos=[image], num_frames=collator.arguments.num_frames).to(model.device)
    return model.get_vision_features(video["pixel_values_videos"], video.get("frame_mask"))
