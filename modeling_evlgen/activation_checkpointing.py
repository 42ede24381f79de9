"""Activation checkpointing in a frozen language model, which transformers' own leaves out."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_frozen_layers(tower: nn.Module) -> None:
    """Computes the layers of a frozen tower again in the backward pass, instead of keeping their activations.

    A frozen tower has activations to keep if a gradient passes through to its inputs. transformers checkpoints a layer
    only if its `training` is True, which may switch on its dropout as well. Here a layer stays in evaluation mode, in
    both forward passes. `activation_checkpointing_enable` switches it on.
    """
    for layer in tower.modules():
        if isinstance(layer, GradientCheckpointingLayer) and getattr(layer.forward, "func", None) is not _run:
            layer.forward = partial(_run, layer, layer.forward)


def _run(layer: GradientCheckpointingLayer, forward: Any, *args: Any, **kwargs: Any) -> Any:
    # A second forward pass would write to a cache again.
    has_cache = any(isinstance(argument, Cache) for argument in (*args, *kwargs.values()))
    if layer.gradient_checkpointing and not layer.training and torch.is_grad_enabled() and not has_cache:
        # The user's `activation_checkpointing_kwargs` are in this function alone.
        return layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)
    return forward(*args, **kwargs)
