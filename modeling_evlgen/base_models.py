"""The base models that an EVLGen is built from, and the room that a checkpoint needs."""

import errno
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from configuration_evlgen import TomeFormerConfig

from .tomeformer import TomeFormerModel

logger = logging.get_logger(__name__)


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


def load_connector(name_or_path: str | os.PathLike, fields: dict[str, Any]) -> TomeFormerModel:
    """Starts a connector from a BERT checkpoint.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder or a repository's name.
        fields: Fields of `TomeFormerConfig` in which it is to differ from that checkpoint's configuration.

    Raises:
        ValueError: If there is no such checkpoint, or a field is out of range, or another connector is wanted.
    """
    if fields.get("model_type", TomeFormerConfig.model_type) != TomeFormerConfig.model_type:
        raise ValueError(
            f"`connector_model` is for a TomeFormer, but `connector_config` is of {fields['model_type']!r}."
        )
    config_dict = load_base_model("connector_model", TomeFormerConfig.get_config_dict, name_or_path, {})[0]
    known = TomeFormerConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    config = TomeFormerConfig(**{name: value for name, value in {**config_dict, **fields}.items() if name in known})
    arguments = {"config": config, "dtype": torch.float32}
    return load_base_model("connector_model", TomeFormerModel.from_pretrained, name_or_path, arguments)


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


def placeholder_ids(text_model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[int, int]:
    """The ids that the processor gives to `<image>` and `<video>`: those that the tokenizer has, or the next ones."""
    hub_kwargs = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in kwargs}
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
