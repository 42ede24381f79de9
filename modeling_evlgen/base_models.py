"""The base models that an EVLGen is built from."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from configuration_evlgen import EVLGenConfig
from configuration_evlgen.configuration_connectors import ConnectorConfig, connector_config_class

from .connectors import load_bert_as_connector
from .fingerprints import INERT_FIELDS, TOWERS, Identity, identify, remember_tower
from .vision_tower import load_vision_tower, measure_vision_tower

logger = logging.get_logger(__name__)


def assemble(
    model_class: type[PreTrainedModel],
    vision_model: str | os.PathLike | PreTrainedModel,
    text_model: str | os.PathLike | PreTrainedModel,
    connector_model: str | os.PathLike | None,
    connector_config: ConnectorConfig | dict | None,
    image_size: int | None,
    dtype: torch.dtype | str,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Does the work of [`EVLGenForConditionalGeneration.from_vision_text_pretrained`], which tells the arguments."""
    vision_kwargs, text_kwargs = _pop_prefixed(kwargs, "vision_"), _pop_prefixed(kwargs, "text_")
    named = {"vision_model": vision_model, "text_model": text_model}
    named = {argument: name for argument, name in named.items() if not isinstance(name, PreTrainedModel)}
    if not isinstance(text_model, PreTrainedModel):
        text_kwargs["dtype"] = dtype
        text_model = load_base_model("text_model", AutoModelForCausalLM.from_pretrained, text_model, text_kwargs)
    if not isinstance(vision_model, PreTrainedModel):
        vision_kwargs["dtype"] = text_model.dtype
        vision_model = load_base_model("vision_model", load_vision_tower, vision_model, vision_kwargs)
    for argument, tower in (("vision_model", vision_model), ("text_model", text_model)):
        refuse_remote_code(argument, tower)
        refuse_adapter(argument, tower)
    if vision_model.dtype != text_model.dtype:
        raise ValueError(
            f"`vision_model` is {vision_model.dtype}, but `text_model` is {text_model.dtype}: the frozen towers "
            "must have one dtype."
        )

    tower = measure_vision_tower(vision_model.config, image_size)
    if not isinstance(connector_config, ConnectorConfig):
        config_class = connector_config_class(connector_config or {})
        known = {"model_type", *config_class.__dataclass_fields__}
        unknown = sorted((connector_config or {}).keys() - known)
        if unknown:
            raise ValueError(f"`connector_config` holds fields that {config_class.__name__} does not have: {unknown}.")
        connector_config = {"class_token": tower.class_token, **(connector_config or {})}
    connector = None
    if connector_model is not None:
        fields = connector_config if isinstance(connector_config, dict) else connector_config.to_dict()
        connector = load_connector(connector_model, fields)
        connector_config = connector.config
    image_token_id, video_token_id = placeholder_ids(text_model, text_kwargs)
    fields = {
        "image_token_id": image_token_id,
        "video_token_id": video_token_id if "image_token_id" not in kwargs else None,
        "num_vision_tokens": tower.num_tokens,
        "vision_hidden_size": tower.hidden_size,
    }
    for argument, tower, tower_kwargs in (
        ("vision_model", vision_model, vision_kwargs),
        ("text_model", text_model, text_kwargs),
    ):
        identity = identify(tower.name_or_path, **_hub_arguments(tower_kwargs))
        if argument not in named:  # nobody knows what has become of a model since it was loaded
            identity = Identity(identity.name_or_path)
        fields |= identity_fields(argument, identity)
    config = EVLGenConfig(
        vision_config=copy_config(vision_model),
        connector_config=copy.deepcopy(connector_config),
        text_config=copy_config(text_model),
        **{**fields, **kwargs},
    )
    model = model_class(config, vision_tower=vision_model, language_model=text_model)
    if connector is not None:
        model.connector.load_state_dict(connector.state_dict())
    text_defaults = text_model.generation_config  # its sampling is for chats
    special = {name: getattr(text_defaults, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    for argument in named:
        tower, tower_kwargs = (
            getattr(model, TOWERS[argument]),
            {"vision_model": vision_kwargs, "text_model": text_kwargs},
        )
        # A tower whose configuration was changed by an argument cannot be loaded again by its name alone.
        if not any(hasattr(tower.config, name) for name in tower_kwargs[argument].keys() - INERT_FIELDS):
            remember_tower(model, TOWERS[argument])
    return model


def copy_config(tower: PreTrainedModel) -> PreTrainedConfig:
    """A copy of a tower's configuration, which an EVLGenConfig may change, as it does the attention implementation.

    Quantisation is left out: whoever loads the checkpoint chooses it anew.
    """
    config = copy.deepcopy(tower.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def identity_fields(argument: str, identity: Identity) -> dict[str, str | None]:
    """The fields of the configuration that name the base model of `argument`."""
    return {f"{argument}_{field}": value for field, value in identity._asdict().items()}


def load_base_model(
    argument: str, load: Callable, name_or_path: str | os.PathLike, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Calls `load(name_or_path, **kwargs)`.

    Raises:
        ValueError: If there is no such model; the message names `argument`.
    """
    try:
        return load(name_or_path, **kwargs)
    except OSError as error:
        raise ValueError(f"`{argument}`={str(name_or_path)!r} cannot be loaded: {error}") from error


def load_connector(name_or_path: str | os.PathLike, fields: dict[str, Any]) -> PreTrainedModel:
    """Starts a connector from a BERT checkpoint.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder or a repository's name.
        fields: Fields of the connector's configuration in which it is to differ from that checkpoint's.

    Raises:
        ValueError: If there is no such checkpoint, a field is out of range, or the connector cannot start from BERT.
    """
    config_class = connector_config_class(fields)
    config_dict = load_base_model("connector_model", config_class.get_config_dict, name_or_path, {})[0]
    known = config_class.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    config = config_class(**{name: value for name, value in {**config_dict, **fields}.items() if name in known})
    return load_base_model("connector_model", load_bert_as_connector, name_or_path, {"config": config})


def refuse_remote_code(argument: str, model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: If the model brings code of its own, which a checkpoint of ours could not load again.
    """
    if type(model.config).__module__.startswith("transformers_modules"):
        raise ValueError(
            f"`{argument}` is a {type(model).__name__}, which brings code of its own. Only models whose code is in "
            "transformers can become part of a checkpoint."
        )


def refuse_adapter(argument: str, model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: If the model has an adapter, which would be trained and saved by other rules than a base model.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`{argument}` is a {type(model).__name__} with an adapter. Merge it first: "
            "`PeftModel.from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(folder)`."
        )


def placeholder_ids(text_model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[int, int]:
    """The ids that the processor gives to `<image>` and `<video>`: those that the tokenizer has, or the next ones."""
    hub_kwargs = _hub_arguments(kwargs)
    known, free = {}, text_model.config.get_text_config().vocab_size
    if text_model.name_or_path:
        try:
            tokenizer = AutoTokenizer.from_pretrained(text_model.name_or_path, **hub_kwargs)
            known, free = tokenizer.get_vocab(), len(tokenizer)
        except (OSError, ValueError):
            logger.warning(
                f"There is no tokenizer beside {text_model.name_or_path}: pass `image_token_id` if it matters."
            )
    image_token_id = known.get("<image>", free)
    return image_token_id, known.get("<video>", free + ("<image>" not in known))


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}


def _pop_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Takes the arguments with a prefix out of `kwargs`, without it. The configuration's own fields stay."""
    names = [name for name in kwargs if name.startswith(prefix) and name not in EVLGenConfig.__dataclass_fields__]
    return {name.removeprefix(prefix): kwargs.pop(name) for name in names}
