"""Which parts of the model are trained: the frozen towers, and how what is trained starts and gets its gradient."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from .vision_tower import find_image_size, is_sharded
from .whitening import whiten_inputs


class TrainedPartsMixin:
    """The part of [`EVLGenModel`] that freezes the towers, and describes and starts the rest."""

    def freeze_towers(self) -> None:
        """Freezes the vision tower and the language model: no gradient, evaluation mode."""
        for tower in (self.vision_tower, self.language_model):
            tower.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for tower in (self.vision_tower, self.language_model):
            if is_frozen(tower):
                tower.eval()
        return self

    def describe_parameters(self) -> str:
        """One line for each part: how many parameters it has, and how many of them are trained."""
        lines = []
        for name, part in self.named_children():
            # PEFT keeps the original of each module that it trains in full.
            parameters = [p for key, p in part.named_parameters() if "original_module" not in key.split(".")]
            count = sum(p.numel() for p in parameters)
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            state = {0: "frozen", count: "trained"}.get(trained, f"{_short(trained)} of them trained")
            lines.append(f"{name}: {_short(count)} parameters, {state}")
        return "\n".join(lines)

    @torch.no_grad()
    def whiten_vision_projection(self, vision_features: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """Starts a fresh vision projection from the statistics of the vision tower's tokens; see [`whiten_inputs`].

        A trained projection would be spoilt.

        Args:
            vision_features (`torch.Tensor` of shape `(images, num_vision_tokens, vision_hidden_size)`):
                Features from [`get_vision_features`], of some hundreds of images like those to come; or an iterable of
                such tensors.

        Raises:
            ValueError: If `vision_features` has another shape, is not finite or does not vary.
        """
        batches = [vision_features] if torch.is_tensor(vision_features) else vision_features
        weight = self.vision_projection.weight
        device = None if weight.is_meta else weight.device  # an offloaded part moves its inputs itself
        try:
            whiten_inputs(self.vision_projection, (self._normalize(batch, device).flatten(0, 1) for batch in batches))
        except ValueError as error:
            raise ValueError(f"`vision_features` cannot be whitened: {error}") from error


def zero_of_trained_parts(model: PreTrainedModel) -> torch.Tensor:
    """Returns a zero whose gradient reaches all trained parts, as that of images does.

    Under DDP and FSDP, processes wait for each other's gradients. One whose batch has no image would let the others
    wait forever.
    """
    tower, config = model.vision_tower, model.config
    device = model.ln_vision.weight.device
    features = torch.zeros(1, config.num_vision_tokens, config.vision_hidden_size, device=device)
    if is_sharded(tower) or model.temporal is not None:
        channels = getattr(tower.config, "num_channels", 3)
        pixels = torch.zeros(1, channels, *find_image_size(tower.config), device=device)
        features = features + 0 * model.get_vision_features(pixels).sum().to(features)
    return 0 * model.project_vision_features(features).pooler_output.sum()


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of a module has a gradient."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.2f} K"
