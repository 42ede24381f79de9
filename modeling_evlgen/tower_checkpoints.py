"""Builds, loads and saves models, whose towers come from base models and may be left out of checkpoints."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, logging

from configuration_evlgen import EVLGenConfig
from configuration_evlgen.configuration_connectors import ConnectorConfig

from .adapters import check_base, find_adapter
from .base_models import build, configure, load_tower, pop_prefixed
from .fingerprints import TOWERS
from .named_towers import choose_towers, leave_out_towers, load_with_named_towers, read_config
from .quantization import hand_over_quantizer, quantize_only_language_model
from .vision_tower import load_vision_tower

logger = logging.get_logger(__name__)


class TowerCheckpointMixin:
    """The part of [`EVLGenForConditionalGeneration`] that builds, loads and saves models."""

    # Hashes of the towers as they were loaded from the base models that `config` names.
    tower_hashes: dict[str, str | None]

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model: str | os.PathLike | PreTrainedModel,
        text_model: str | os.PathLike | PreTrainedModel,
        connector_model: str | os.PathLike | None = None,
        connector_config: ConnectorConfig | dict | None = None,
        image_size: int | None = None,
        dtype: torch.dtype | str = "auto",
        **kwargs: Any,
    ) -> Self:
        """Builds a model from any vision tower and any causal language model, in evaluation mode.

        Args:
            vision_model, text_model (`str`, `os.PathLike` or `PreTrainedModel`):
                The towers: a folder, a repository's name, or a loaded model each.
            connector_model (`str` or `os.PathLike`, *optional*):
                A BERT checkpoint to start a TomeFormer or a Q-Former from, e.g. `bert-base-uncased`.
            connector_config ([`TomeFormerConfig`] or `dict`, *optional*):
                The connector's configuration, or the fields in which it differs from `connector_model`'s or from the
                defaults. `class_token` follows the vision tower. A `dict` may hold another connector's `model_type`.
            image_size (`int`, *optional*):
                Height and width of the images in pixels. The default is the vision tower's, or else 224.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
                Of the frozen towers; by default the language model's. What is trained is float32.
            kwargs:
                Arguments with the prefix `vision_` or `text_` go to that tower's `from_pretrained` (`vision_revision`,
                `text_attn_implementation` …). The rest goes to [`EVLGenConfig`], e.g. `image_token_id`, which is by
                default the id that the language model's tokenizer has for `<image>` or gives to a new token.

        Raises:
            ValueError: If a base model cannot be loaded or the parts do not fit each other.
        """
        vision_kwargs, text_kwargs = pop_prefixed(kwargs, "vision_"), pop_prefixed(kwargs, "text_")
        text_kwargs["dtype"] = dtype
        text = load_tower("text_model", AutoModelForCausalLM.from_pretrained, text_model, text_kwargs)
        vision_kwargs["dtype"] = text.tower.dtype  # with "auto", only the loaded model knows it
        vision = load_tower("vision_model", load_vision_tower, vision_model, vision_kwargs)
        config, connector = configure(vision, text, connector_model, connector_config, image_size, kwargs)
        model = build(cls, config, vision, text, connector)
        logger.info(model.describe_parameters())
        return model.eval()

    @classmethod
    def from_image_model(cls, image_model: str | os.PathLike, **kwargs: Any) -> Self:
        """Turns an image checkpoint, a folder or a repository's name, into a video model in evaluation mode.

        The temporal contextualizer starts as the identity: outputs for a video of equal frames are those for an image.
        `temporal_hidden_size`, `temporal_num_attention_heads` and `temporal_frame_positions` go to [`EVLGenConfig`],
        other arguments to [`from_pretrained`].
        """
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("temporal_")}
        image_model = cls.from_pretrained(image_model, **kwargs)
        settings = {**image_model.config.to_dict(), "temporal_contextualizer": True, **fields}
        model = cls(EVLGenConfig.from_dict(settings), image_model.vision_tower, image_model.language_model)
        for name in ("ln_vision", "vision_projection", "connector", "language_projection"):
            getattr(model, name).load_state_dict(getattr(image_model, name).state_dict())
        model.generation_config = image_model.generation_config
        model.tower_hashes = image_model.tower_hashes
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Self:
        """Loads a checkpoint as [`~PreTrainedModel.from_pretrained`] does, and freezes the towers.

        `quantization_config` is for the language model alone. A checkpoint that names its towers instead of holding
        them loads the base models, from the Hub or its cache. Then `dtype`, `device_map`, `max_memory` and
        `attn_implementation` are for the towers, and what is trained goes where the vision tower is. An adapter's
        folder or repository gives its model with the adapter.

        Raises:
            ValueError: If a named tower cannot be loaded, or is not the one that the model was trained on. If an
                adapter is for another model. If there is no configuration.
            OSError: If there is no such checkpoint, or its files are damaged.
        """
        config, name_or_path = None, pretrained_model_name_or_path
        if name_or_path is not None:
            name_or_path, adapter = find_adapter(name_or_path, kwargs)
            config = read_config(name_or_path, kwargs)
            if adapter is not None:
                check_base(config, adapter, {**kwargs, **(kwargs.get("adapter_kwargs") or {})})
        try:
            if config is not None and config.towers == "reference":
                return load_with_named_towers(cls, name_or_path, config, adapter, kwargs)
            loaded = super().from_pretrained(name_or_path, *args, **quantize_only_language_model(kwargs))
        except SafetensorError as error:
            raise OSError(f"The weights in {str(name_or_path)!r} cannot be read: {error}") from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hand_over_quantizer(model)
        model.freeze_towers()
        return loaded

    @staticmethod
    def load_language_model(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        """Loads the language model that a checkpoint names. A subclass that needs a part of it may load that alone."""
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, towers: str | None = None, **kwargs: Any
    ) -> None:
        """Saves weights, configuration and code as [`~PreTrainedModel.save_pretrained`] does.

        Args:
            towers (`str`, *optional*):
                `"include"` saves the frozen towers as well. `"reference"` saves what is trained, and the names,
                revisions and fingerprints of the base models that the towers are loaded from again. The default is
                `config.towers`; or else `"reference"` if both towers are repositories on the Hub and unchanged, and
                `"include"` otherwise.

        Raises:
            ValueError: If `towers` is `"reference"`, but a tower has no name, or has changed since it was loaded. If
                `"include"` is to save a quantised language model. If the model was loaded with an adapter, or the
                folder holds one.
            OSError: If the disk has no room for the weights. An earlier checkpoint in the folder is left as it is.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "A model that was loaded with an adapter cannot be saved. Load the model that the adapter is for, and "
                "`PeftModel.from_pretrained(model, adapter)`: its `save_pretrained` saves the adapter, and "
                "`merge_and_unload().save_pretrained` a model that has become one with it."
            )
        if os.path.exists(os.path.join(save_directory, ADAPTER_CONFIG_NAME)):
            raise ValueError(
                f"`save_directory`: {save_directory} holds an adapter ({ADAPTER_CONFIG_NAME}), which would be loaded "
                "together with this model. Remove it or name another folder."
            )
        towers = choose_towers(self, towers, kwargs.get("state_dict"))
        leave_out_towers(self, towers == "reference")
        parts = [part for name, part in self.named_children() if towers == "include" or name not in TOWERS.values()]
        check_disk_space(save_directory, sum(t.nbytes for part in parts for t in part.state_dict().values()))
        # config.json records what this checkpoint holds; the model's own wish is for the next one.
        before, self.config.towers = self.config.towers, towers
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.towers = before


def check_disk_space(save_directory: str | os.PathLike, needed: int) -> None:
    """
    Raises:
        OSError: If fewer than `needed` bytes are free where `save_directory` is, or will be.
    """
    folder = Path(save_directory).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    if needed > free:
        message = f"The checkpoint needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, message, str(save_directory))
