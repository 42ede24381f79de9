"""The processor's output, whose labels never hold placeholders."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature

EXACT_INPUTS = ("frame_times", "token_places")  # they stay float32: in bfloat16, 300 and 301 seconds are one time


class EVLGenBatch(BatchFeature):
    """A `BatchFeature` in which `labels` are -100 on placeholders, whoever sets them.

    Training loops of others set `batch["labels"]` to a copy of `input_ids`, and some compute the loss outside of the
    model. TRL does both. `placeholder_ids` are the ids of `<image>` and `<video>`.
    """

    def __init__(
        self, data: dict[str, Any] | None = None, *args: Any, placeholder_ids: Sequence[int] = (), **kwargs: Any
    ):
        self._placeholder_ids = tuple(placeholder_ids)  # before the labels are set
        super().__init__(data, *args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "labels" and torch.is_tensor(value):
            placeholder_ids = torch.tensor(self._placeholder_ids, device=value.device)
            value = value.masked_fill(torch.isin(value, placeholder_ids), -100)
        super().__setitem__(name, value)

    def to(self, *args: Any, **kwargs: Any) -> "EVLGenBatch":
        """As `BatchFeature.to`, but times stay float32."""
        kept = {name: self[name] for name in EXACT_INPUTS if torch.is_tensor(self.get(name))}
        super().to(*args, **kwargs)
        for name, tensor in kept.items():
            self[name] = tensor.to(self[name].device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_placeholder_ids": self._placeholder_ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._placeholder_ids = state.pop("_placeholder_ids")
        super().__setstate__(state)
