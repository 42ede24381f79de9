"""Activation checkpointing in a frozen language model."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_frozen_layers(tower: nn.Module) -> None:
    """Lets the layers of a frozen tower be computed again in the backward pass, instead of keeping their activations.

    These are needed where a gradient passes through to the tower's inputs. transformers' layers look at their own
    `training`, by which some switch on dropout as well, so those of a tower in evaluation mode keep everything. Here
    they stay in evaluation mode, in the forward pass and in the second one.

    Args:
        tower (`nn.Module`): With layers that `activation_checkpointing_enable` has switched on; without effect for as
            long as they are switched off or trained.
    """
    for layer in tower.modules():
        if isinstance(layer, GradientCheckpointingLayer) and getattr(layer.forward, "func", None) is not _run:
            layer.forward = partial(_run, layer, layer.forward)


def _run(layer: GradientCheckpointingLayer, forward: Any, *args: Any, **kwargs: Any) -> Any:
    caches = any(isinstance(argument, Cache) for argument in (*args, *kwargs.values()))  # to be written to only once
    if layer.gradient_checkpointing and not layer.training and torch.is_grad_enabled() and not caches:
        return layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)
    return forward(*args, **kwargs)
