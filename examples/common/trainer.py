"""transformers' Trainer, with the paper's weight decay and a collator of its own for held-out pictures."""

from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from common.data import CaptionCollator


class EVLGenTrainer(Trainer):
    """
    Args:
        eval_collator ([`CaptionCollator`]): Makes the held-out batches, without augmentation.
        kwargs: What [`Trainer`] takes.
    """

    def __init__(self, *args: Any, eval_collator: CaptionCollator, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay for matrices only, none for biases, norms and gains (the original's lavis/runners/runner_base.py)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
