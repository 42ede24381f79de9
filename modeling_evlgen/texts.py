"""The texts of a row: their targets, and several texts of one image that follow one prefix.

Such a row holds the prefix, one text after the other, and padding. Each text sees the prefix and itself alone.
`segment_ids`, `(batch, sequence)`, are 0 on the prefix, n on the n-th text, and -1 on padding. Loss and gradients are
those of a row for each text.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

from configuration_evlgen import EVLGenConfig

logger = logging.get_logger(__name__)

_MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")  # others read no mask of their caller's


def mask_labels(
    labels: torch.LongTensor, placeholder_ids: Sequence[int], attention_mask: torch.Tensor | None
) -> torch.LongTensor:
    """Returns labels that are -100 on placeholders, on padding, and on the first token after padding.

    So a copy of `input_ids` can serve as labels. Both are `(batch, sequence)`; another mask marks no padding.
    """
    ignored = torch.isin(labels, labels.new_tensor(placeholder_ids))  # (batch, sequence)
    if torch.is_tensor(attention_mask) and attention_mask.shape == labels.shape:
        is_padding = attention_mask.to(labels.device) == 0
        ignored = ignored | is_padding | nn.functional.pad(is_padding[:, :-1], (1, 0))
    return labels.masked_fill(ignored, -100)


def shift_labels(labels: torch.LongTensor) -> torch.LongTensor:
    """Returns the target of each position: the label of the next. Both are `(batch, sequence)`."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def check_length(length: int, cache: Any, config: EVLGenConfig) -> None:
    """Raises a ValueError if new tokens, after those in the cache, are more than the language model has positions."""
    limit = getattr(config.text_config.get_text_config(), "max_position_embeddings", None)
    if limit is None:  # a model without positions, whose cache may not know its length
        return
    length += cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    if isinstance(limit, int) and isinstance(length, int) and length > limit:  # in a graph, lengths may be symbols
        raise ValueError(f"`input_ids` has {length} tokens, but the language model has places for {limit}.")


def warn_of_endless(targets: torch.LongTensor, end_ids: int | list[int] | None) -> None:
    """Warns if no target is one of the ids that end generation: a model trained on such texts would not stop."""
    if end_ids is None or (targets == -100).all() or torch.isin(targets, targets.new_tensor(end_ids)).any():
        return
    logger.warning(
        f"No text of the first batch of `labels` ends: none has `generation_config.eos_token_id` ({end_ids}), so the "
        "model does not learn to stop. `processor(images=…, text=prompt, suffix=caption)` makes labels with an end."
    )


def target_positions(labels: torch.LongTensor, segment_ids: torch.LongTensor | None = None) -> torch.BoolTensor:
    """Returns True where the model has a target, `(batch, sequence)`.

    As `logits_to_keep`, it limits logits to these positions. Most are images, prompts and padding.
    """
    if segment_ids is None:
        return shift_labels(labels) != -100
    texts = separate(segment_ids)
    has_target = texts.targets(labels) != -100  # (texts, length)
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[texts.rows.expand_as(has_target)[has_target], texts.places[has_target]] = True
    return mask


def limit_logits(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds a `logits_to_keep` for the positions with a target to a model's inputs that have labels but none yet."""
    if "labels" not in inputs or "logits_to_keep" in inputs:
        return inputs
    return {**inputs, "logits_to_keep": target_positions(inputs["labels"], inputs.get("segment_ids"))}


def select_positions(targets: torch.LongTensor, logits_to_keep: int | torch.Tensor) -> torch.LongTensor:
    """The targets, `(batch, positions)`, of positions with logits; of those of a mask, `(batch, sequence)`, a list."""
    if isinstance(logits_to_keep, int):
        return targets[:, -logits_to_keep:]  # -0 is the first
    return targets[:, logits_to_keep] if logits_to_keep.ndim == 1 else targets[logits_to_keep]


@dataclass
class SeparateTexts:
    """Where the tokens of each text lie, those of its prefix first.

    Args:
        rows (`torch.LongTensor` of shape `(texts, 1)`): The row of each text.
        places (`torch.LongTensor` of shape `(texts, length)`): The place of each of its tokens in that row.
        mask (`torch.BoolTensor` of shape `(texts, length)`): False where a text is shorter than the longest.
    """

    rows: torch.LongTensor
    places: torch.LongTensor
    mask: torch.BoolTensor

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Of values for each token, `(batch, sequence, …)`, those of each text, `(texts, length, …)`."""
        return values[self.rows, self.places]

    def targets(self, labels: torch.LongTensor) -> torch.LongTensor:
        """The target of each token of each text, `(texts, length)`, from `labels`, `(batch, sequence)`."""
        return shift_labels(self.take(labels).masked_fill(~self.mask, -100))

    def pair(
        self, logits: torch.Tensor, targets: torch.LongTensor, logits_to_keep: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """Scores, `(targets, vocab)`, and targets, `(targets,)`. The end of a prefix has a target for each text.

        `logits` and `logits_to_keep` are those of shared rows, as in `forward`. `targets` are those of [`targets`].
        """
        has_target = targets != -100  # (texts, length)
        is_mask = torch.is_tensor(logits_to_keep) and logits_to_keep.dtype == torch.bool
        if not is_mask and (torch.is_tensor(logits_to_keep) or logits_to_keep != 0):
            raise ValueError("`logits_to_keep` must be 0 or a mask of shape (batch, sequence) beside `segment_ids`.")
        if not is_mask:
            rows = self.rows.expand_as(targets)[has_target]
            return logits[rows, self.places[has_target]], targets[has_target]
        has_target &= self.take(logits_to_keep)
        numbers = (logits_to_keep.flatten().cumsum(0) - 1).view_as(logits_to_keep)  # of each kept position
        return logits[self.take(numbers)[has_target]], targets[has_target]


def separate(segment_ids: torch.LongTensor) -> SeparateTexts:
    """Finds the tokens of each text. Texts are in the order of their rows."""
    counts = segment_ids.amax(dim=1)  # (batch,)
    if counts.min() < 1:
        raise ValueError(f"`segment_ids` must number the texts of each row from 1, but have {counts.tolist()} texts.")
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)  # (texts,)
    numbers = torch.cat([torch.arange(1, count + 1) for count in counts.tolist()]).to(rows.device)  # (texts,)
    of_rows = segment_ids[rows]  # (texts, sequence)
    is_part = (of_rows == 0) | (of_rows == numbers[:, None])
    length = int(is_part.sum(dim=1).max())
    places = (~is_part).int().argsort(dim=1, stable=True)[:, :length]  # parts first, in their order
    return SeparateTexts(rows[:, None], places, is_part.gather(1, places))


def count_positions(segment_ids: torch.LongTensor) -> torch.LongTensor:
    """The position of each token in its own text, `(batch, sequence)`. Each text goes on behind the prefix."""
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    is_start = nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    starts = places.masked_fill(~is_start, 0).cummax(dim=1).values  # (batch, sequence), of each token's segment
    prefix = (segment_ids == 0).sum(dim=1, keepdim=True)  # (batch, 1)
    positions = places - starts + prefix * (segment_ids > 0)
    return positions.masked_fill(segment_ids < 0, 0)


def build_masks(
    config: Any, inputs_embeds: torch.Tensor, segment_ids: torch.LongTensor, positions: torch.LongTensor
) -> Any:
    """The language model's `attention_mask`: one for all layers, or one for each of its configuration's layer types.

    A token sees the prefix and its own text up to itself. A sliding window counts the positions in its text.
    """
    window = getattr(config, "sliding_window", None)

    def sees(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        segment = segment_ids[batch, key]
        return (segment == 0) | (segment == segment_ids[batch, query])

    def sees_near(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        distance = positions[batch, query] - positions[batch, key]
        return sees(batch, head, query, key) & (distance < window)

    def build(rule: Any) -> Any:
        return create_causal_mask(config, inputs_embeds, None, None, and_mask_function=rule)

    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return build(sees if window is None else sees_near)
    if "sliding_attention" not in layer_types:
        return build(sees)
    rules = {"full_attention": sees, "sliding_attention": sees_near}
    return {layer_type: build(rules[layer_type]) for layer_type in set(layer_types)}


def can_share(language_model: PreTrainedModel) -> bool:
    """Whether a language model takes such masks and positions. If not, it gets a row for each text; said once."""
    config = language_model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    attention, name = config._attn_implementation, type(language_model).__name__  # no public name
    reason = None
    if attention not in _MASKED_ATTENTION:
        reason = f"attention {attention!r} takes no such mask ({', '.join(_MASKED_ATTENTION)} do)"
    elif (
        "position_ids" not in inspect.signature(language_model.forward).parameters
        or not language_model._supports_attention_backend  # then it does not use transformers' masks
        or getattr(language_model, "_is_stateful", False)
        or getattr(config, "attention_chunk_size", None) is not None
        or not kinds <= {"full_attention", "sliding_attention"}
    ):
        reason = f"{name} takes no such mask"
    if reason is not None:
        logger.warning_once(f"The texts of an image cannot share its prefix: {reason}. Each is a row of its own.")
    return reason is None
