"""Batches of text alone, in a training that also has images."""

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .vision_tower import find_image_size


def zero_of_trained_parts(model: PreTrainedModel) -> torch.Tensor:
    """Returns a zero whose gradient reaches all trained parts, as that of images does.

    Under DDP and FSDP, processes wait for each other's gradients. One whose batch has no image would let the others
    wait forever.

    Args:
        model ([`EVLGenModel`]): The model.
    """
    tower, config = model.vision_tower, model.config
    device = model.ln_vision.weight.device
    features = torch.zeros(1, config.num_vision_tokens, config.vision_hidden_size, device=device)
    is_sharded = isinstance(next(tower.parameters()), DTensor)  # processes gather the weights together
    if is_sharded or model.temporal is not None:
        channels = getattr(tower.config, "num_channels", 3)
        pixels = torch.zeros(1, channels, *find_image_size(tower.config), device=device)
        features = features + 0 * model.get_vision_features(pixels).sum().to(features)
    return 0 * model.project_vision_features(features).pooler_output.sum()
