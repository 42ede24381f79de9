"""Builds a new model from base models: any vision tower, any causal language model, and perhaps a BERT."""

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from configuration_evlgen import EVLGenConfig
from configuration_evlgen.configuration_connectors import ConnectorConfig, connector_config_class

from .connectors import load_bert_as_connector
from .fingerprints import INERT_FIELDS, TOWERS, Identity, find_name, identify, remember_tower
from .vision_tower import measure_vision_tower

logger = logging.get_logger(__name__)


class BaseModel(NamedTuple):
    """A tower, and how it can be loaded again."""

    tower: PreTrainedModel
    identity: Identity
    is_named: bool  # its name alone brings back the tower as it is now
    hub_arguments: dict[str, Any]


def load_tower(
    argument: str, load: Callable, model: str | os.PathLike | PreTrainedModel, kwargs: dict[str, Any]
) -> BaseModel:
    """Loads a tower with `load(model, **kwargs)`, unless `model` is loaded already.

    Raises:
        ValueError: If the tower cannot be loaded, or cannot become part of a checkpoint; the message names `argument`.
    """
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
    tower = model if isinstance(model, PreTrainedModel) else load_base_model(argument, load, model, kwargs)
    check_tower(argument, tower)
    if tower is model:
        # The user may have changed it since it was loaded, so its name does not bring it back.
        return BaseModel(tower, Identity(find_name(tower.name_or_path)[0]), False, hub)
    # `from_pretrained` also takes fields of the configuration, as in `text_rms_norm_eps=1e-5`.
    has_other_fields = any(hasattr(tower.config, name) for name in kwargs.keys() - INERT_FIELDS)
    return BaseModel(tower, identify(tower.name_or_path, **hub), not has_other_fields, hub)


def load_base_model(
    argument: str, load: Callable, name_or_path: str | os.PathLike, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Calls `load(name_or_path, **kwargs)`.

    Raises:
        ValueError: If there is no such model; the message names `argument`.
    """
    try:
        return load(name_or_path, **kwargs)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`{argument}`={str(name_or_path)!r} cannot be loaded: {error}") from error


def check_tower(argument: str, tower: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: If a tower brings code that a checkpoint of ours could not load again, or has an adapter, which
            would be trained and saved by other rules than a base model.
    """
    if type(tower.config).__module__.startswith("transformers_modules"):
        raise ValueError(
            f"`{argument}` is a {type(tower).__name__}, which brings code of its own. Only models whose code is in "
            "transformers can become part of a checkpoint."
        )
    if getattr(tower, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`{argument}` is a {type(tower).__name__} with an adapter. Merge it first: "
            "`PeftModel.from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(folder)`."
        )


def load_connector(
    name_or_path: str | os.PathLike | None, connector_config: ConnectorConfig | dict | None, class_token: bool
) -> tuple[ConnectorConfig | dict, PreTrainedModel | None]:
    """Returns the connector's configuration; and the connector, if it starts from a BERT checkpoint.

    Raises:
        ValueError: If there is no such checkpoint, a field is unknown or out of range, or the connector cannot start
            from BERT.
    """
    if not isinstance(connector_config, ConnectorConfig):
        connector_config = {"class_token": class_token, **(connector_config or {})}
        config_class = connector_config_class(connector_config)
        unknown = sorted(connector_config.keys() - {"model_type", *config_class.__dataclass_fields__})
        if unknown:
            raise ValueError(f"`connector_config` holds fields that {config_class.__name__} does not have: {unknown}.")
    if name_or_path is None:
        return connector_config, None
    fields = connector_config if isinstance(connector_config, dict) else connector_config.to_dict()
    config_class = connector_config_class(fields)
    config_dict = load_base_model("connector_model", config_class.get_config_dict, name_or_path, {})[0]
    known = {**config_dict, **fields}
    config = config_class(**{name: known[name] for name in config_class.field_names() if name in known})
    connector = load_base_model("connector_model", load_bert_as_connector, name_or_path, {"config": config})
    return connector.config, connector


def configure(
    vision: BaseModel,
    text: BaseModel,
    connector_model: str | os.PathLike | None,
    connector_config: ConnectorConfig | dict | None,
    image_size: int | None,
    fields: dict[str, Any],
) -> tuple[EVLGenConfig, PreTrainedModel | None]:
    """Returns the configuration of a model with some `fields` set, and the connector that it starts from, if any.

    Raises:
        ValueError: If the parts do not fit each other.
    """
    if vision.tower.dtype != text.tower.dtype:
        raise ValueError(
            f"`vision_model` is {vision.tower.dtype}, but `text_model` is {text.tower.dtype}: the frozen towers "
            "must have one dtype."
        )
    shape = measure_vision_tower(vision.tower.config, image_size)
    connector_config, connector = load_connector(connector_model, connector_config, shape.class_token)
    image_token_id, video_token_id = placeholder_ids(text)
    defaults = {
        "image_token_id": image_token_id,
        # Beside an `<image>` of the user's choice, `<video>` is the next id.
        "video_token_id": video_token_id if "image_token_id" not in fields else None,
        "num_vision_tokens": shape.num_tokens,
        "vision_hidden_size": shape.hidden_size,
        **identity_fields("vision_model", vision.identity),
        **identity_fields("text_model", text.identity),
    }
    config = EVLGenConfig(
        vision_config=copy_config(vision.tower),
        connector_config=copy.deepcopy(connector_config),
        text_config=copy_config(text.tower),
        **{**defaults, **fields},
    )
    return config, connector


def placeholder_ids(text: BaseModel) -> tuple[int, int]:
    """The ids of `<image>` and `<video>` in the processor: those that the tokenizer has, or the next ones."""
    known, free = {}, text.tower.config.get_text_config().vocab_size
    if text.tower.name_or_path:
        try:
            tokenizer = AutoTokenizer.from_pretrained(text.tower.name_or_path, **text.hub_arguments)
            known, free = tokenizer.get_vocab(), len(tokenizer)
        except (OSError, ValueError):
            logger.warning(
                f"There is no tokenizer beside {text.tower.name_or_path}: pass `image_token_id` if it matters."
            )
    image_token_id = known.get("<image>", free)
    return image_token_id, known.get("<video>", free + ("<image>" not in known))


def identity_fields(argument: str, identity: Identity) -> dict[str, str | None]:
    """The fields of the configuration that name the base model of `argument`."""
    return {f"{argument}_{field}": value for field, value in identity._asdict().items()}


def copy_config(tower: PreTrainedModel) -> PreTrainedConfig:
    """A copy of a tower's configuration, which an [`EVLGenConfig`] may change."""
    config = copy.deepcopy(tower.config)
    if hasattr(config, "quantization_config"):  # whoever loads the checkpoint chooses it anew
        del config.quantization_config
    return config


def build(
    model_class: type[PreTrainedModel],
    config: EVLGenConfig,
    vision: BaseModel,
    text: BaseModel,
    connector: PreTrainedModel | None,
) -> PreTrainedModel:
    """Builds the model of a configuration with the weights of the towers, and perhaps of a connector."""
    model = model_class(config, vision_tower=vision.tower, language_model=text.tower)
    if connector is not None:
        model.connector.load_state_dict(connector.state_dict())
    # The language model's defaults for sampling are meant for chats, not for captions.
    special_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(
        **{id_: getattr(text.tower.generation_config, id_) for id_ in special_ids}
    )
    for base_model, tower in zip((vision, text), TOWERS.values(), strict=True):
        if base_model.is_named:
            remember_tower(model, tower)
    return model


def pop_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Takes arguments with a prefix out of `kwargs`, except fields of the configuration (`vision_hidden_size` …)."""
    names = [name for name in kwargs if name.startswith(prefix) and name not in EVLGenConfig.__dataclass_fields__]
    return {name.removeprefix(prefix): kwargs.pop(name) for name in names}
