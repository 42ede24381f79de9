"""Checkpoints that hold what is trained and name the frozen towers, instead of holding them as well."""

import copy
import errno
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import get_max_memory
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from configuration_evlgen import EVLGenConfig

from .adapters import HUB_ARGUMENTS, check_base
from .base_models import copy_config, identity_fields, load_base_model
from .fingerprints import CONFIG_FIELDS, TOWERS, compare_configs, hash_weights, identify, is_on_hub, remember_tower
from .vision_tower import load_vision_tower

logger = logging.get_logger(__name__)

# What the tower's loaders are told; anything else is a mistake.
_LOADING_ARGUMENTS = (
    "dtype",
    "torch_dtype",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_buffers",
    "attn_implementation",
    "quantization_config",
    "low_cpu_mem_usage",
)
# What transformers' own callers add, which has no say here.
_PASSING_ARGUMENTS = (
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "code_revision",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
)


def choose_towers(model: PreTrainedModel, asked: str | None, weights: Mapping[str, torch.Tensor] | None = None) -> str:
    """Whether a checkpoint is to hold the towers: `"include"` or `"reference"`; see `save_pretrained`.

    Args:
        model: `EVLGenForConditionalGeneration`.
        asked: What `save_pretrained` was told.
        weights: The model's weights, where it holds only a share of them itself, as under FSDP.
    """
    if asked not in (None, "include", "reference"):
        raise ValueError(f'`towers` must be "include" or "reference", but is {asked!r}.')
    names = {tower: getattr(model.config, f"{argument}_name_or_path") for argument, tower in TOWERS.items()}
    on_hub = all(is_on_hub(name) for name in names.values())
    chosen = asked or model.config.towers or ("reference" if on_hub else "include")
    if chosen == "reference":
        weights = model.state_dict() if weights is None else weights
        problems = [problem for tower, name in names.items() if (problem := _problem(model, tower, name, weights))]
        if problems and asked == "reference":
            raise ValueError(f'`towers` cannot be "reference": {"; ".join(problems)}.')
        if problems:
            logger.warning(f"The checkpoint holds its towers: {'; '.join(problems)}.")
            chosen = "include"
    if chosen == "include" and getattr(model.language_model, "hf_quantizer", None) is not None:
        raise ValueError(
            '`towers` cannot be "include" with a quantised language model. A checkpoint that only names its towers, '
            'saved with `towers="reference"`, can be loaded quantised, trained and saved; so can an adapter.'
        )
    return chosen


def _problem(model: PreTrainedModel, tower: str, name: str | None, weights: Mapping[str, torch.Tensor]) -> str | None:
    """What keeps a tower from being named instead of saved."""
    if name is None:
        return f"{tower} has no name"
    loaded, prefix = model.tower_hashes.get(tower), f"{tower}."
    own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    if loaded is None or loaded != hash_weights(own):
        return f"{tower} differs from {name!r}"
    return None


def leave_out_towers(model: PreTrainedModel, leave_out: bool) -> None:
    """Tells transformers which weights a checkpoint is not to hold."""
    names = model.state_dict().keys() if leave_out else ()
    model._keys_to_ignore_on_save = {name for name in names if _is_towers(name)}


def towers_may_stay(model: PreTrainedModel, keys: Any) -> None:
    """Where a state dict holds nothing of the towers, as a checkpoint that names them, nothing of them is missing."""
    missing = {name for name in keys.missing_keys if _is_towers(name)}
    # Parameters alone: a BatchNorm that was saved by an old PyTorch may lack a buffer.
    if missing >= {name for name, _ in model.named_parameters() if _is_towers(name)}:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in missing]


def _is_towers(name: str) -> bool:
    return name.split(".")[0] in TOWERS.values()


# What quantisation is to leave alone, as most of transformers' configurations call it; bitsandbytes' has its own name.
_SKIPPED = "modules_to_not_convert"


class Reference(NamedTuple):
    """A checkpoint that names its towers: where it is, its configuration, and the adapter to be put on it, if any."""

    name_or_path: str | os.PathLike
    config: EVLGenConfig
    hub_arguments: dict[str, Any]
    adapter: str | None
    adapter_kwargs: dict[str, Any]


def find_reference(name_or_path: str | os.PathLike, adapter: str | None, kwargs: dict[str, Any]) -> Reference | None:
    """Looks whether a checkpoint names its towers instead of holding them.

    Args:
        name_or_path (`str` or `os.PathLike`): The checkpoint.
        adapter (`str`, *optional*): The adapter to be put on it.
        kwargs: What else `from_pretrained` was given. If there is such a checkpoint, what this function has made use
            of is taken out.

    Raises:
        ValueError: If the adapter is for another model.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    adapter_kwargs = dict(kwargs.get("adapter_kwargs") or {})
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):  # of this or another copy of the code
        config_dict, _ = EVLGenConfig.get_config_dict(name_or_path if config is None else config, **hub)
        if adapter is not None:
            check_base(EVLGenConfig.from_dict(config_dict), adapter, {**hub, **adapter_kwargs})
        if config_dict.get("towers") != "reference":
            return None
        fields = EVLGenConfig.__dataclass_fields__.keys() - {"dtype"}  # which is the towers' here
        changes = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
        for argument in TOWERS:  # another repository does not have the commit
            if f"{argument}_name_or_path" in changes:
                changes.setdefault(f"{argument}_revision", None)
        config = EVLGenConfig.from_dict(config_dict, **changes)
    elif adapter is not None:
        check_base(config, adapter, {**hub, **adapter_kwargs})
    if config.towers != "reference":
        return None
    for name in ("config", *hub, *_PASSING_ARGUMENTS):
        kwargs.pop(name, None)
    adapter_kwargs.pop("_adapter_model_path", None)
    return Reference(name_or_path, config, hub, adapter, adapter_kwargs)


def load_reference(
    model_class: type[PreTrainedModel], reference: Reference, kwargs: dict[str, Any]
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """Puts a model together again from its checkpoint and the base models that this names.

    Args:
        model_class: `EVLGenForConditionalGeneration`, of this or of another copy of the code.
        reference: The checkpoint.
        kwargs: What else `from_pretrained` was told.

    Returns:
        The model, in evaluation mode; with `output_loading_info`, also what that asks for.

    Raises:
        ValueError: If a base model cannot be loaded, or is not the one that the model was trained on.
        TypeError: If there are arguments that mean nothing here.
    """
    name_or_path, config, hub, adapter, adapter_kwargs = reference
    wants_info = kwargs.pop("output_loading_info", False)
    unknown = sorted(kwargs.keys() - set(_LOADING_ARGUMENTS))
    if unknown:
        raise TypeError(f"A checkpoint without its towers does not take these arguments: {', '.join(unknown)}.")
    weights = _load_weights(name_or_path, hub)
    shared = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    shared |= kwargs
    dtype = shared.pop("torch_dtype", None) if shared.get("dtype") is None else shared["dtype"]
    shared["dtype"] = config.dtype if dtype in (None, "auto") else dtype
    quantization_config = shared.pop("quantization_config", None)
    vision_tower = _load_tower("vision_model", load_vision_tower, config, shared)
    if shared.get("max_memory") is not None:
        shared["max_memory"] = _memory_left(shared["max_memory"], vision_tower)
    if quantization_config is not None:
        shared["quantization_config"] = quantization_config
    language_model = _load_tower("text_model", model_class.load_language_model, config, shared)

    model = model_class(config, vision_tower, language_model)
    model.config.name_or_path = name_or_path
    model.name_or_path = str(name_or_path)
    for tower in TOWERS.values():
        remember_tower(model, tower)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    for names, what in ((missing, "start afresh: the checkpoint lacks"), (unexpected, "are left out: nothing takes")):
        if names:
            logger.warning(f"Some weights {what} {', '.join(names)}.")
    for name, part in model.named_children():
        if name not in TOWERS.values():
            part.to(_device_of(vision_tower))
    places = {name: getattr(getattr(model, name), "hf_device_map", None) for name in TOWERS.values()}
    if any(places.values()):
        model.hf_device_map = _join_device_maps(model, places)
    try:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub)
    except OSError:
        logger.info("The checkpoint has no generation_config.json.")
    if adapter is not None:
        own = {name: hub[name] for name in hub.keys() - {"revision", "subfolder"}}
        model.load_adapter(adapter, adapter_kwargs={**own, **adapter_kwargs})
    model.eval()
    info = {"missing_keys": set(missing), "unexpected_keys": set(unexpected), "mismatched_keys": set()}
    return (model, info) if wants_info else model


def quantize_only_language_model(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which a `quantization_config` leaves all but the language model alone."""
    if kwargs.get("quantization_config") is None:
        return kwargs
    quantization_config = copy.deepcopy(kwargs["quantization_config"])
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    others = ["vision_tower", "ln_vision", "vision_projection", "connector", "language_projection", "temporal"]
    others += ["language_model.lm_head"]  # as transformers leaves it by default
    skipped = "llm_int8_skip_modules" if hasattr(quantization_config, "llm_int8_skip_modules") else _SKIPPED
    setattr(quantization_config, skipped, others + (getattr(quantization_config, skipped, None) or []))
    return {**kwargs, "quantization_config": quantization_config}


def hand_over_quantizer(model: PreTrainedModel) -> None:
    """Makes it the language model that is quantised, not the whole, which a Trainer would refuse to train."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    model.language_model.hf_quantizer = model.hf_quantizer
    model.language_model.is_quantized = True
    model.is_quantized = False
    del model.hf_quantizer, model.config.quantization_config


def _load_tower(argument: str, load: Any, config: EVLGenConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    name = getattr(config, f"{argument}_name_or_path")
    revision = getattr(config, f"{argument}_revision")
    if name is None:
        raise ValueError(
            f"The checkpoint does not hold its towers, and its configuration has no `{argument}_name_or_path`."
        )
    kwargs = {**kwargs, "revision": revision}
    if isinstance(kwargs.get("device_map"), dict):
        kwargs["device_map"] = _part_of(kwargs["device_map"], TOWERS[argument])
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    tower = load_base_model(f"{argument}_name_or_path", load, name, kwargs)
    found = identify(name, **{key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs})
    wanted, config_name = getattr(config, f"{argument}_fingerprint"), CONFIG_FIELDS[argument]
    if wanted is None:  # any tower will do
        setattr(config, config_name, copy_config(tower))
    else:
        changes = compare_configs(tower.config, getattr(config, config_name))
        if found.fingerprint != wanted:
            changes.insert(0, f"the fingerprint of its weights is {found.fingerprint}, not {wanted}")
        if changes:
            where = f"folder {os.path.abspath(name)}" if os.path.isdir(name) else f"revision {revision or 'main'}"
            raise ValueError(
                f"{name!r} ({where}) is not the base model that the checkpoint was trained on: {'; '.join(changes)}. "
                f"Name the right one by `{argument}_name_or_path` and `{argument}_revision`, or take this one with "
                f"`{argument}_fingerprint=None`."
            )
    for field, value in identity_fields(argument, found).items():  # with the commit, where a branch was named
        setattr(config, field, value)
    return tower


def _load_weights(name_or_path: str | os.PathLike, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, from one file or several."""
    path = cached_file(name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if path is not None:
        return load_file(path)
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **hub)
    paths, _ = get_checkpoint_shard_files(name_or_path, index, **hub)
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def _memory_left(max_memory: dict[Any, int | str], tower: PreTrainedModel) -> dict[Any, int]:
    """What a loaded tower leaves of each device's memory."""
    left = get_max_memory(max_memory)
    for parameter in tower.parameters():
        device = parameter.device.index if parameter.device.index in left else parameter.device.type
        if device in left:
            left[device] = max(0, left[device] - parameter.nbytes)
    return left


def _device_of(tower: PreTrainedModel) -> torch.device:
    """Where a tower computes; weights that are kept elsewhere until then are on the meta device."""
    devices = (parameter.device for parameter in tower.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _part_of(device_map: dict[str, Any], tower: str) -> dict[str, Any]:
    """What a device map says of a tower, without the tower's name.

    Raises:
        ValueError: If it says nothing.
    """
    own = {
        name.removeprefix(tower).removeprefix("."): device
        for name, device in device_map.items()
        if name == tower or name.startswith(f"{tower}.")
    }
    if not own and "" not in device_map:
        raise ValueError(f'`device_map` says nothing of {tower!r}, nor, by "", of the whole: {device_map}.')
    return own or {"": device_map[""]}


def _join_device_maps(model: PreTrainedModel, places: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name, part in model.named_children():
        own = places.get(name) or {"": next(part.parameters()).device}
        joined |= {f"{name}.{key}".rstrip("."): device for key, device in own.items()}
    return joined


def check_disk_space(save_directory: str | os.PathLike, needed: int) -> None:
    """
    Raises:
        OSError: If fewer than `needed` bytes are free where `save_directory` is, or will be.
    """
    folder = os.path.abspath(save_directory)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"The checkpoint needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, message, str(save_directory))
