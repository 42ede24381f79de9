"""Checkpoints that name their frozen towers instead of holding them."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.modules.module import _IncompatibleKeys
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from configuration_evlgen import EVLGenConfig

from .adapters import HUB_ARGUMENTS
from .base_models import copy_config, identity_fields, load_base_model
from .device_maps import memory_left, place_trained_parts, select_part
from .fingerprints import TOWERS, compare_configs, hash_weights, identify, is_on_hub, remember_tower
from .vision_tower import load_vision_tower

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` for the towers. Any others are mistakes.
_LOADING_ARGUMENTS = {"dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_buffers"}
_LOADING_ARGUMENTS |= {"attn_implementation", "quantization_config", "low_cpu_mem_usage"}
# Arguments that transformers' Auto classes and pipelines add, without a meaning here. `config` has been read by then.
_IGNORED_ARGUMENTS = {"_commit_hash", "_from_auto", "_from_pipeline", "code_revision", "config"}
_IGNORED_ARGUMENTS |= {"trust_remote_code", "use_safetensors", "weights_only"}


def choose_towers(
    model: PreTrainedModel, requested: str | None, weights: Mapping[str, torch.Tensor] | None = None
) -> str:
    """Decides whether a checkpoint holds the towers: `"include"` or `"reference"`; see `save_pretrained`.

    Args:
        model ([`EVLGenForConditionalGeneration`]): The model.
        requested (`str`, *optional*): `save_pretrained`'s argument `towers`.
        weights (*optional*): The model's weights, if it holds only a share of them itself, as under FSDP.

    Raises:
        ValueError: If `requested` is neither of the two, or cannot be done.
    """
    if requested not in (None, "include", "reference"):
        raise ValueError(f'`towers` must be "include" or "reference", but is {requested!r}.')
    names = {tower: getattr(model.config, f"{argument}_name_or_path") for argument, tower in TOWERS.items()}
    on_hub = all(is_on_hub(name) for name in names.values())
    chosen = requested or model.config.towers or ("reference" if on_hub else "include")
    if chosen == "reference":
        weights = model.state_dict() if weights is None else weights
        problems = [problem for tower, name in names.items() if (problem := _problem(model, tower, name, weights))]
        if problems and requested == "reference":
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
    """The reason why a tower cannot be named instead of saved, if there is one."""
    if name is None:
        return f"{tower} has no name"
    before, prefix = model.tower_hashes.get(tower), f"{tower}."
    if before is None:  # a tower from a checkpoint, given as a model, offloaded, or loaded with other fields
        return f"{tower} cannot be compared with {name!r}"
    now = hash_weights({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    return None if now == before else f"{tower} differs from {name!r}"


def leave_out_towers(model: PreTrainedModel, leave_out: bool) -> None:
    """Sets which weights transformers does not save."""
    names = model.state_dict().keys() if leave_out else ()
    model._keys_to_ignore_on_save = {name for name in names if _is_towers(name)}


def allow_missing_towers(model: PreTrainedModel, keys: _IncompatibleKeys) -> None:
    """Hook of `load_state_dict`: weights without any tower are complete."""
    missing = {name for name in keys.missing_keys if _is_towers(name)}
    # Parameters alone: a BatchNorm that was saved by an old PyTorch may lack a buffer.
    if missing >= {name for name, _ in model.named_parameters() if _is_towers(name)}:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in missing]


def _is_towers(name: str) -> bool:
    return name.split(".")[0] in TOWERS.values()


def read_config(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> EVLGenConfig:
    """Reads the configuration of a checkpoint, or takes that in the `kwargs` of `from_pretrained`.

    If the checkpoint names its towers, fields of the configuration move there from `kwargs`.

    Raises:
        ValueError: If the checkpoint has no configuration.
    """
    config, changes = kwargs.get("config"), {}
    if isinstance(config, PreTrainedConfig):  # of this or another copy of the code
        return config
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    config_dict, _ = EVLGenConfig.get_config_dict(name_or_path if config is None else config, **hub)
    if config_dict.get("towers") == "reference":
        fields = EVLGenConfig.__dataclass_fields__.keys() - {"dtype"}  # which is the towers' here
        changes = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
    for argument in TOWERS:  # another repository does not have the commit
        if f"{argument}_name_or_path" in changes:
            changes.setdefault(f"{argument}_revision", None)
    return EVLGenConfig.from_dict(config_dict, **changes)


def load_with_named_towers(
    model_class: type[PreTrainedModel],
    name_or_path: str | os.PathLike,
    config: EVLGenConfig,
    adapter: str | None,
    kwargs: dict[str, Any],
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """Builds a model from a checkpoint, the base models that it names, and perhaps an adapter.

    `kwargs` are the other arguments of `from_pretrained`.

    Raises:
        ValueError: If a base model cannot be loaded, or is not the one that the model was trained on.
        TypeError: If there are arguments without a meaning for such a checkpoint.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in _IGNORED_ARGUMENTS}
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
    adapter_kwargs.pop("_adapter_model_path", None)
    wants_info = kwargs.pop("output_loading_info", False)
    unknown = sorted(kwargs.keys() - _LOADING_ARGUMENTS)
    if unknown:
        raise TypeError(f"A checkpoint without its towers does not take these arguments: {', '.join(unknown)}.")
    weights = _load_weights(name_or_path, hub)
    hub_of_all = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    vision_tower, language_model = _load_towers(
        model_class, config, hub_of_all | kwargs, sum(t.nbytes for t in weights.values())
    )
    model = model_class(config, vision_tower, language_model)
    model.config.name_or_path = name_or_path
    model.name_or_path = str(name_or_path)
    for tower in TOWERS.values():
        remember_tower(model, tower)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    for names, problem in ((missing, "start afresh, since the checkpoint lacks them"), (unexpected, "are left out")):
        if names:
            logger.warning(f"Some weights {problem}: {', '.join(names)}.")
    place_trained_parts(model)
    try:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub)
    except OSError:
        logger.info("The checkpoint has no generation_config.json.")
    if adapter is not None:
        model.load_adapter(adapter, adapter_kwargs={**hub_of_all, **adapter_kwargs})
    model.eval()
    info = {"missing_keys": set(missing), "unexpected_keys": set(unexpected), "mismatched_keys": set()}
    return (model, info) if wants_info else model


def _load_weights(name_or_path: str | os.PathLike, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loads a checkpoint's tensors, from one file or several."""
    path = cached_file(name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if path is not None:
        return load_file(path)
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **hub)
    paths, _ = get_checkpoint_shard_files(name_or_path, index, **hub)
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def _load_towers(
    model_class: type[PreTrainedModel], config: EVLGenConfig, kwargs: dict[str, Any], trained_bytes: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Loads the vision tower, and the language model into the memory that it and the trained weights leave."""
    dtype = kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"]
    kwargs["dtype"] = config.dtype if dtype in (None, "auto") else dtype
    vision_tower = _load_tower("vision_model", load_vision_tower, config, {**kwargs, "quantization_config": None})
    if kwargs.get("max_memory") is not None:
        kwargs["max_memory"] = memory_left(kwargs["max_memory"], vision_tower, trained_bytes)
    return vision_tower, _load_tower("text_model", model_class.load_language_model, config, kwargs)


def _load_tower(argument: str, load: Callable, config: EVLGenConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    name = getattr(config, f"{argument}_name_or_path")
    if name is None:
        raise ValueError(
            f"The checkpoint does not hold its towers, and its configuration has no `{argument}_name_or_path`."
        )
    kwargs = {**kwargs, "revision": getattr(config, f"{argument}_revision")}
    if isinstance(kwargs.get("device_map"), dict):
        kwargs["device_map"] = select_part(kwargs["device_map"], TOWERS[argument])
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    tower = load_base_model(f"{argument}_name_or_path", load, name, kwargs)
    found = identify(name, **{key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs})
    if getattr(config, f"{argument}_fingerprint") is None:  # any tower will do
        setattr(config, argument.replace("model", "config"), copy_config(tower))
    else:
        _check_tower(argument, tower, found.fingerprint, config)
    for field, value in identity_fields(argument, found).items():  # with the commit, where a branch was named
        setattr(config, field, value)
    return tower


def _check_tower(argument: str, tower: PreTrainedModel, fingerprint: str | None, config: EVLGenConfig) -> None:
    """
    Raises:
        ValueError: If a tower has other weights or another configuration than the one that the model was trained on.
    """
    name, revision, wanted = (
        getattr(config, f"{argument}_{field}") for field in ("name_or_path", "revision", "fingerprint")
    )
    changes = compare_configs(tower.config, getattr(config, argument.replace("model", "config")))
    if fingerprint != wanted:
        changes.insert(0, f"the fingerprint of its weights is {fingerprint}, not {wanted}")
    if changes:
        where = f"folder {os.path.abspath(name)}" if os.path.isdir(name) else f"revision {revision or 'main'}"
        raise ValueError(
            f"{name!r} ({where}) is not the base model that the checkpoint was trained on: {'; '.join(changes)}. "
            f"Name the right one by `{argument}_name_or_path` and `{argument}_revision`, or take this one with "
            f"`{argument}_fingerprint=None`."
        )
