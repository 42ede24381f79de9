"""transformers' Trainer, with the paper's weight decay and a collator of its own for held-out pictures."""

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer

from common.data import CaptionCollator


class EVLGenTrainer(Trainer):
    """
    Args:
        eval_collator ([`CaptionCollator`]): Makes the held-out batches, without augmentation.
        kwargs: What [`Trainer`] takes.

    Raises:
        ValueError: If a model with a temporal contextualizer is to be shared out by FSDP or DeepSpeed.
    """

    def __init__(self, *args: Any, eval_collator: CaptionCollator, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        scalars = [name for name, parameter in self.model.named_parameters() if parameter.ndim == 0]
        if scalars and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"FSDP and DeepSpeed cannot share out scalars, such as {scalars[0]}. Launch the training with "
                "examples/accelerate_configs/multi_gpu.yaml."
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Under `--bf16`, FSDP and DeepSpeed would compute and sum the gradients of what is trained in bfloat16, and
        DeepSpeed would save it so. What is trained stays in float32, under autocast, as with one process."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        if self.is_deepspeed_enabled and self.args.bf16:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager:
        # accelerate leaves autocast under FSDP to the policy above; elsewhere the model's forward has it.
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay for matrices only, none for biases, norms and gains (the original's lavis/runners/runner_base.py)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
