"""Splits `device_map` and `max_memory` between towers that are loaded one after the other, and joins the results."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.accelerate import get_max_memory

from .fingerprints import TOWERS


def select_part(device_map: dict[str, Any], part: str) -> dict[str, Any]:
    """The entries of a device map for one part of the model, without the part's name.

    Raises:
        ValueError: If there are none.
    """
    entries = {
        name.removeprefix(part).removeprefix("."): device
        for name, device in device_map.items()
        if name == part or name.startswith(f"{part}.")
    }
    if not entries and "" not in device_map:
        raise ValueError(f'`device_map` must have an entry for {part!r}, or for all by "", but is {device_map}.')
    return entries or {"": device_map[""]}


def find_device(tower: PreTrainedModel) -> torch.device:
    """The device that a tower computes on."""
    devices = (parameter.device for parameter in tower.parameters())
    # Weights that are offloaded to the disk are on the meta device until they are needed.
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def memory_left(max_memory: dict[Any, int | str], tower: PreTrainedModel, trained_bytes: int) -> dict[Any, int]:
    """The memory of each device in bytes, less what a loaded tower takes, and what is trained, beside it."""
    left = get_max_memory(max_memory)
    taken = [(parameter.device, parameter.nbytes) for parameter in tower.parameters()]
    for device, num_bytes in [*taken, (find_device(tower), trained_bytes)]:
        key = device.index if device.index in left else device.type
        if key in left:
            left[key] = max(0, left[key] - num_bytes)
    return left


def place_trained_parts(model: PreTrainedModel) -> None:
    """Moves what is trained to the vision tower's device, and sets `model.hf_device_map` if a tower has one."""
    device_map: dict[str, Any] = {}
    for name, part in model.named_children():
        if name not in TOWERS.values():
            part.to(find_device(model.vision_tower))
        entries = getattr(part, "hf_device_map", None) or {"": next(part.parameters()).device}
        device_map |= {f"{name}.{key}".rstrip("."): place for key, place in entries.items()}
    if any(hasattr(getattr(model, tower), "hf_device_map") for tower in TOWERS.values()):
        model.hf_device_map = device_map
