"""Builds models from base models: a new one, or that of a checkpoint which only names its towers."""

import copy
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import get_max_memory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from configuration_evlgen import EVLGenConfig
from configuration_evlgen.configuration_connectors import ConnectorConfig, connector_config_class

from .connectors import load_bert_as_connector
from .fingerprints import HUB_ARGUMENTS, INERT_FIELDS, TOWERS, compare_configs, find_name, hash_weights, identify
from .vision_tower import load_vision_tower, measure_vision_tower

logger = logging.get_logger(__name__)

# Arguments that transformers' Auto classes and pipelines add, without a meaning here. `config` has been read by then.
_IGNORED_ARGUMENTS = {"_commit_hash", "_from_auto", "_from_pipeline", "code_revision", "config"}
_IGNORED_ARGUMENTS |= {"trust_remote_code", "use_safetensors", "weights_only"}


# What libraries raise if files are missing or damaged, or weights do not fit their configuration.
_DAMAGE = (ArithmeticError, OSError, RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError)


class BaseModel(NamedTuple):
    """A tower, and how it can be loaded again."""

    tower: PreTrainedModel
    identity: dict[str, str | None]  # fields of the configuration
    is_named: bool  # its name alone brings back the tower as it is now
    hub_arguments: dict[str, Any]


def load_tower(
    argument: str, load: Callable, model: str | os.PathLike | PreTrainedModel, kwargs: dict[str, Any]
) -> BaseModel:
    """Loads a tower with `load(model, **kwargs)`, unless `model` is loaded already.

    Raises a ValueError, which names `argument`, if it cannot be loaded or cannot become part of a checkpoint.
    """
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    tower = model if isinstance(model, PreTrainedModel) else _load(argument, load, model, kwargs)
    if type(tower.config).__module__.startswith("transformers_modules"):
        raise ValueError(
            f"`{argument}` is a {type(tower).__name__}, which brings code of its own. Only models whose code is in "
            "transformers can become part of a checkpoint."
        )
    if getattr(tower, "peft_config", None):
        # It would be trained and saved by other rules than a base model.
        raise ValueError(
            f"`{argument}` is a {type(tower).__name__} with an adapter. Merge it first: "
            "`PeftModel.from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(folder)`."
        )
    if tower is model:
        # The user may have changed it since it was loaded, so its name does not bring it back.
        return BaseModel(tower, {f"{argument}_name_or_path": find_name(tower.name_or_path)[0]}, False, hub)
    # `from_pretrained` also takes fields of the configuration, as in `text_rms_norm_eps=1e-5`.
    has_other_fields = any(hasattr(tower.config, name) for name in kwargs.keys() - INERT_FIELDS)
    return BaseModel(tower, identify(argument, tower.name_or_path, **hub), not has_other_fields, hub)


def _load(argument: str, load: Callable, name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> Any:
    """Calls `load(name_or_path, **kwargs)`. If it cannot be loaded, a ValueError or TypeError names `argument`."""
    try:
        return load(name_or_path, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except _DAMAGE as error:
        error_class = TypeError if isinstance(error, TypeError) else ValueError  # such as an unknown argument
        raise error_class(f"`{argument}`={str(name_or_path)!r} cannot be loaded: {error}") from error


def build(
    model_class: type[PreTrainedModel],
    vision: BaseModel,
    text: BaseModel,
    connector_model: str | os.PathLike | None,
    connector_config: ConnectorConfig | dict | None,
    image_size: int | None,
    fields: dict[str, Any],
) -> PreTrainedModel:
    """Builds a new model around its towers, with some `fields` of its configuration set."""
    dtypes = vision.tower.dtype, text.tower.dtype
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"`vision_model` is {dtypes[0]}, but `text_model` is {dtypes[1]}: they must have one dtype.")
    shape = measure_vision_tower(vision.tower.config, image_size)
    connector_config, connector = load_connector(connector_model, connector_config, shape.class_token)
    # Beside an `<image>` of the user's choice, `<video>` is the next id.
    ids = {} if "image_token_id" in fields else placeholder_ids(text)
    sizes = {"num_vision_tokens": shape.num_tokens, "vision_hidden_size": shape.hidden_size}
    config = EVLGenConfig(
        vision_config=copy.deepcopy(vision.tower.config),
        connector_config=connector_config,
        text_config=copy.deepcopy(text.tower.config),
        **{**ids, **sizes, **vision.identity, **text.identity, **fields},
    )
    model = model_class(config, vision_tower=vision.tower, language_model=text.tower)
    if connector is not None:
        model.connector.load_state_dict(connector.state_dict())
    # The language model's defaults for sampling are meant for chats, not for captions.
    special_ids, defaults = ("bos_token_id", "eos_token_id", "pad_token_id"), text.tower.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(defaults, name) for name in special_ids})
    for base_model, tower in zip((vision, text), TOWERS.values(), strict=True):
        if base_model.is_named:
            model.tower_hashes[tower] = hash_weights(base_model.tower.state_dict())
    return model


def load_connector(
    name_or_path: str | os.PathLike | None, connector_config: ConnectorConfig | dict | None, class_token: bool
) -> tuple[ConnectorConfig | dict, PreTrainedModel | None]:
    """Returns the connector's configuration; and the connector, if it starts from a BERT checkpoint."""
    is_config = isinstance(connector_config, PreTrainedConfig)
    if is_config:
        config_class, fields = type(connector_config), connector_config.to_dict()
    else:
        fields = {"class_token": class_token, **(connector_config or {})}
        config_class = connector_config_class(fields)
        unknown = sorted(fields.keys() - {"model_type", *config_class.__dataclass_fields__})
        if unknown:
            raise ValueError(f"`connector_config` holds fields that {config_class.__name__} does not have: {unknown}.")
    if name_or_path is None:
        return copy.deepcopy(connector_config) if is_config else config_class(**fields), None
    known = {**_load("connector_model", config_class.get_config_dict, name_or_path, {})[0], **fields}
    config = config_class(**{name: known[name] for name in config_class.field_names() if name in known})
    connector = _load("connector_model", load_bert_as_connector, name_or_path, {"config": config})
    return connector.config, connector


def placeholder_ids(text: BaseModel) -> dict[str, int]:
    """The ids of `<image>` and `<video>` in the processor: those that the tokenizer has, or the next ones."""
    known, free = {}, text.tower.config.get_text_config().vocab_size
    if text.tower.name_or_path:
        try:
            tokenizer = AutoTokenizer.from_pretrained(text.tower.name_or_path, **text.hub_arguments)
            known, free = tokenizer.get_vocab(), len(tokenizer)
        except (OSError, ValueError):
            logger.warning(f"{text.tower.name_or_path} has no tokenizer: pass `image_token_id` if it matters.")
    video_token_id = known.get("<video>", free + ("<image>" not in known))
    return {"image_token_id": known.get("<image>", free), "video_token_id": video_token_id}


def load_with_named_towers(
    model_class: type[PreTrainedModel],
    name_or_path: str | os.PathLike,
    config: EVLGenConfig,
    adapter: str | None,
    kwargs: dict[str, Any],
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """Builds a model from a checkpoint, the base models that it names, and perhaps an adapter.

    `kwargs` are the other arguments of `from_pretrained`. Those that are not about files go to the towers. Raises a
    ValueError if a base model cannot be loaded, or is not the one that the model was trained on.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in _IGNORED_ARGUMENTS}
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
    adapter_kwargs.pop("_adapter_model_path", None)  # see `find_adapter`
    wants_info = kwargs.pop("output_loading_info", False)
    weights = _load_weights(name_or_path, hub)
    hub_of_all = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    towers = _load_towers(model_class, config, hub_of_all | kwargs, sum(t.nbytes for t in weights.values()))
    model = model_class(config, *towers)
    model.config.name_or_path = name_or_path
    model.name_or_path = str(name_or_path)
    model.tower_hashes = {tower: hash_weights(getattr(model, tower).state_dict()) for tower in TOWERS.values()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    for names, problem in ((missing, "start afresh, since the checkpoint lacks them"), (unexpected, "are left out")):
        if names:
            logger.warning(f"Some weights {problem}: {', '.join(names)}.")
    _place_trained_parts(model)
    with suppress(OSError):  # there may be no generation_config.json
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub)
    if adapter is not None:
        model.load_adapter(adapter, adapter_kwargs={**hub_of_all, **adapter_kwargs})
    model.eval()
    info = {"missing_keys": set(missing), "unexpected_keys": set(unexpected), "mismatched_keys": set()}
    return (model, info) if wants_info else model


def _load_weights(name_or_path: str | os.PathLike, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loads a checkpoint's tensors, from one file or several."""
    if has_file(name_or_path, os.path.join(hub.get("subfolder", ""), SAFE_WEIGHTS_NAME), **hub):
        return load_file(cached_file(name_or_path, SAFE_WEIGHTS_NAME, **hub))
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
        left = get_max_memory(kwargs["max_memory"])  # in bytes, of each device
        taken = [(parameter.device, parameter.nbytes) for parameter in vision_tower.parameters()]
        for device, num_bytes in [*taken, (_find_device(vision_tower), trained_bytes)]:
            key = device.index if device.index in left else device.type
            if key in left:
                left[key] = max(0, left[key] - num_bytes)
        kwargs["max_memory"] = left
    return vision_tower, _load_tower("text_model", model_class.load_language_model, config, kwargs)


def _load_tower(argument: str, load: Callable, config: EVLGenConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Loads a tower that `config` names, and writes into `config` which one it is.

    Raises a ValueError if it cannot be loaded, or is not the one that the model was trained on.
    """
    fields = "name_or_path", "revision", "fingerprint"
    name, revision, wanted = (getattr(config, f"{argument}_{field}") for field in fields)
    if name is None:
        raise ValueError(f"The checkpoint lacks its towers, and its configuration has no `{argument}_name_or_path`.")
    kwargs = {key: value for key, value in {**kwargs, "revision": revision}.items() if value is not None}
    if isinstance(kwargs.get("device_map"), dict):
        kwargs["device_map"] = _select_part(kwargs["device_map"], TOWERS[argument])
    hub, part = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}, argument.replace("model", "config")
    try:
        tower = _load(f"{argument}_name_or_path", load, name, kwargs)
    except (TypeError, ValueError) as error:
        changes = []
        with suppress(*_DAMAGE):
            now = AutoConfig.from_pretrained(name, **hub)
            changes = compare_configs(getattr(now, part, now), getattr(config, part))
        hint = f"; its configuration is not that of the base model: {'; '.join(changes)}" if changes else ""
        raise type(error)(f"{error}{hint}") from error
    found = identify(argument, name, **hub)
    changes = compare_configs(tower.config, getattr(config, part))
    if found[f"{argument}_fingerprint"] != wanted:
        changes.insert(0, f"the fingerprint of its weights is {found[f'{argument}_fingerprint']}, not {wanted}")
    if changes and wanted is not None:
        where = f"folder {os.path.abspath(name)}" if os.path.isdir(name) else f"revision {revision or 'main'}"
        raise ValueError(
            f"{name!r} ({where}) is not the base model that the checkpoint was trained on: {'; '.join(changes)}. "
            f"Name the right one by `{argument}_name_or_path` and `{argument}_revision`, or take this one with "
            f"`{argument}_fingerprint=None`."
        )
    for field, value in found.items():  # with the commit, where a branch was named
        setattr(config, field, value)
    return tower


def _select_part(device_map: dict[str, Any], part: str) -> dict[str, Any]:
    """The entries of a device map for one part of the model, without the part's name."""
    entries = {
        name.removeprefix(part).removeprefix("."): device
        for name, device in device_map.items()
        if name == part or name.startswith(f"{part}.")
    }
    if not entries and "" not in device_map:
        raise ValueError(f'`device_map` must have an entry for {part!r}, or for all by "", but is {device_map}.')
    return entries or {"": device_map[""]}


def _find_device(tower: PreTrainedModel) -> torch.device:
    """The device that a tower computes on."""
    devices = (parameter.device for parameter in tower.parameters())
    # Weights that are offloaded to the disk are on the meta device until they are needed.
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _place_trained_parts(model: PreTrainedModel) -> None:
    """Moves what is trained to the vision tower's device, and sets `model.hf_device_map` if a tower has one."""
    device_map: dict[str, Any] = {}
    for name, part in model.named_children():
        if name not in TOWERS.values():
            part.to(_find_device(model.vision_tower))
        entries = getattr(part, "hf_device_map", None) or {"": next(part.parameters()).device}
        device_map |= {f"{name}.{key}".rstrip("."): place for key, place in entries.items()}
    if any(hasattr(getattr(model, tower), "hf_device_map") for tower in TOWERS.values()):
        model.hf_device_map = device_map
