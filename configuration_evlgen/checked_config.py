"""The base of EVLGen's configurations: fields of a wrong type or out of range are refused by name."""

import inspect
import math
import os
from typing import Any

from huggingface_hub.dataclasses import type_validator
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME


class CheckedConfig(PreTrainedConfig):
    """A configuration that checks the types of its fields.

    Raises:
        TypeError: If a field does not have the type of its annotation.
    """

    def __post_init__(self, **kwargs: Any):
        for name in self.field_names():
            annotation, value = self.__dataclass_fields__[name].type, getattr(self, name)
            try:
                type_validator(name, value, annotation)
            except TypeError:
                expected = inspect.formatannotation(annotation)
                raise TypeError(f"`{name}` must be of type {expected}, but is {value!r}.") from None
        super().__post_init__(**kwargs)

    @classmethod
    def field_names(cls) -> list[str]:
        """Returns the names of the fields that only this configuration has, not every one in transformers."""
        return [name for name in cls.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads config.json as [`~PreTrainedConfig.get_config_dict`] does.

        Raises:
            ValueError: If there is none that names a model. transformers would silently build the defaults.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not isinstance(config_dict, dict) or "model_type" not in config_dict:
            raise ValueError(f"{str(pretrained_model_name_or_path)!r} has no {CONFIG_NAME} with a `model_type`.")
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "CheckedConfig":
        # transformers sets the fields in `kwargs` after all checks, so they join the others here. Whole parts stay: it
        # merges those with the parts in `config_dict`.
        names = [name for name in cls.field_names() if name in kwargs and name not in cls.sub_configs]
        return super().from_dict({**config_dict, **{name: kwargs.pop(name) for name in names}}, **kwargs)

    def _check_range(self, name: str, low: float, high: float = math.inf) -> None:
        """
        Raises:
            ValueError: If a field is neither None nor a finite number from `low` to `high`.
        """
        value = getattr(self, name)
        if value is None:
            return
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be finite, but is {value}.")
        if not low <= value <= high:
            expected = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"`{name}` must be {expected}, but is {value}.")
