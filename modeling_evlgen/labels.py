"""Labels of the caption loss: what is a target, and at which positions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def mask_labels(
    labels: torch.LongTensor, placeholder_ids: Sequence[int], attention_mask: torch.Tensor | None
) -> torch.LongTensor:
    """Returns labels that are -100 on placeholders, on padding, and on the first token after padding.

    So a copy of `input_ids` can serve as labels. No token is predicted from padding. Both tensors are `(batch,
    sequence)`. A mask of another shape marks no padding.
    """
    ignored = torch.isin(labels, labels.new_tensor(placeholder_ids))  # (batch, sequence)
    if torch.is_tensor(attention_mask) and attention_mask.shape == labels.shape:
        is_padding = attention_mask.to(labels.device) == 0
        ignored = ignored | is_padding | nn.functional.pad(is_padding[:, :-1], (1, 0))
    return labels.masked_fill(ignored, -100)


def shift_labels(labels: torch.LongTensor) -> torch.LongTensor:
    """Returns the target of each position: the label of the next. Both are `(batch, sequence)`."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def target_positions(labels: torch.LongTensor) -> torch.BoolTensor:
    """Returns True where the model has a target, `(batch, sequence)`.

    As `logits_to_keep`, it limits logits to these positions. Most positions of a training batch are images, prompts
    and padding.
    """
    return shift_labels(labels) != -100


def limit_logits(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds a `logits_to_keep` for the positions with a target to a model's inputs that have labels but none yet."""
    if "labels" not in inputs or "logits_to_keep" in inputs:
        return inputs
    return {**inputs, "logits_to_keep": target_positions(inputs["labels"])}


def select_positions(targets: torch.LongTensor, logits_to_keep: int | torch.Tensor) -> torch.LongTensor:
    """Returns the targets of the positions that have logits: of `(batch, sequence)` those in `(batch, positions)`.

    `logits_to_keep` is the number of last positions, 0 for all; or indices, `(positions,)`; or a mask, `(batch,
    sequence)`, for which the result is `(positions,)`.
    """
    if isinstance(logits_to_keep, int):
        return targets[:, -logits_to_keep:]  # -0 is the first
    return targets[:, logits_to_keep] if logits_to_keep.ndim == 1 else targets[logits_to_keep]
