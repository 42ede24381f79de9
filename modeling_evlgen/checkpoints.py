"""The base class of EVLGen's models: builds, loads and saves them; freezes, describes and whitens their parts."""

import copy
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, logging

from configuration_evlgen import EVLGenConfig
from configuration_evlgen.configuration_connectors import ConnectorConfig

from .base_models import build, load_tower, load_with_named_towers
from .fingerprints import HUB_ARGUMENTS, TOWERS, TRAINED_PARTS, check_base, choose_towers, find_adapter, is_on_hub
from .vision_tower import is_frozen, load_vision_tower, whiten_inputs

logger = logging.get_logger(__name__)


class EVLGenPreTrainedModel(PreTrainedModel):
    """Builds, loads and saves models, whose towers come from base models and may be left out of checkpoints."""

    config: EVLGenConfig
    vision_tower: PreTrainedModel
    language_model: PreTrainedModel
    ln_vision: nn.LayerNorm
    vision_projection: nn.Linear
    _normalize: Callable[..., torch.Tensor]  # checks vision features, and runs `ln_vision` over them
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
        vision_kwargs, text_kwargs = _pop_prefixed(kwargs, "vision_"), _pop_prefixed(kwargs, "text_")
        text_kwargs["dtype"] = dtype
        text = load_tower("text_model", AutoModelForCausalLM.from_pretrained, text_model, text_kwargs)
        vision_kwargs["dtype"] = text.tower.dtype  # with "auto", only the loaded model knows it
        vision = load_tower("vision_model", load_vision_tower, vision_model, vision_kwargs)
        model = build(cls, vision, text, connector_model, connector_config, image_size, kwargs)
        logger.info(model.describe_parameters())
        return model.eval()

    @classmethod
    def from_image_model(cls, image_model: str | os.PathLike, **kwargs: Any) -> Self:
        """Turns an image checkpoint, a folder or a repository's name, into a video model in evaluation mode.

        The temporal contextualizer starts as the identity: outputs for a video of equal frames are those for an image.
        `kwargs` are those of [`from_pretrained`], and the contextualizer's fields, such as `temporal_hidden_size`.
        """
        return cls.from_pretrained(image_model, temporal_contextualizer=True, **kwargs)

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
        config, adapter, name_or_path = None, None, pretrained_model_name_or_path
        if name_or_path is not None:
            name_or_path, adapter = find_adapter(name_or_path, kwargs)
            config = _read_config(name_or_path, kwargs)
            if adapter is not None:
                check_base(config, adapter, {**kwargs, **(kwargs.get("adapter_kwargs") or {})})
        try:
            if config is not None and config.towers == "reference":
                return load_with_named_towers(cls, name_or_path, config, adapter, kwargs)
            loaded = super().from_pretrained(name_or_path, *args, **_quantize_only_language_model(kwargs))
        except (ArithmeticError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            is_named = adapter is None and isinstance(error, (LookupError, TypeError, ValueError))
            if is_named or isinstance(error, torch.OutOfMemoryError):
                raise
            if adapter is None:
                raise OSError(f"The weights in {str(name_or_path)!r} cannot be loaded: {error}") from error
            what = f"The adapter {str(adapter)!r} cannot be loaded as its {ADAPTER_CONFIG_NAME} says"
            raise ValueError(f"{what}: {type(error).__name__}: {error}") from error  # PEFT checks little of it
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model, "hf_quantizer", None) is not None:
            # Only the language model is quantised. A Trainer would refuse to train a model that is marked as such.
            model.language_model.hf_quantizer, model.language_model.is_quantized = model.hf_quantizer, True
            model.is_quantized = False
            del model.hf_quantizer, model.config.quantization_config
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
                `"include"` saves the frozen towers as well, and no path of a folder that they came from.
                `"reference"` saves what is trained, and the names, revisions and fingerprints of the base models that
                the towers are loaded from again. The default is `config.towers`; or else `"reference"` if both towers
                are on the Hub and unchanged.

        Raises:
            ValueError: If `towers` is `"reference"`, but a tower has no name, or has changed since it was loaded. If
                `"include"` is to save a quantised language model. If the model was loaded with an adapter, or the
                folder holds one.
            OSError: If the disk has no room for the weights. An earlier checkpoint in the folder is left as it is.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(
                "A model with an adapter cannot be saved. Load the model that the adapter is for, and "
                "`PeftModel.from_pretrained(model, adapter)`: its `save_pretrained` saves the adapter, and "
                "`merge_and_unload().save_pretrained` a model that has become one with it."
            )
        if os.path.exists(os.path.join(save_directory, ADAPTER_CONFIG_NAME)):
            where = f"`save_directory`: {save_directory} holds an adapter ({ADAPTER_CONFIG_NAME})"
            raise ValueError(f"{where}, which would be loaded with this model. Remove it or name another folder.")
        state_dict = kwargs.pop("state_dict", None)
        state_dict = self.state_dict() if state_dict is None else state_dict
        towers = choose_towers(self, towers, state_dict)
        if towers == "reference":
            state_dict = {name: tensor for name, tensor in state_dict.items() if not _is_towers(name)}
        check_disk_space(save_directory, sum(tensor.nbytes for tensor in state_dict.values()), "The checkpoint")
        # config.json records what this checkpoint holds; the model's own wish is for the next one.
        fields: dict[str, str | None] = {"towers": towers}
        if towers == "include":  # a folder's path says nothing to whoever gets the checkpoint
            names = {name: getattr(self.config, name) for name in (f"{argument}_name_or_path" for argument in TOWERS)}
            fields |= {name: None for name, value in names.items() if not is_on_hub(value)}
        before = {name: getattr(self.config, name) for name in fields}
        try:
            self.config.update(fields)
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        finally:
            self.config.update(before)
        if os.path.exists(config := os.path.join(save_directory, CONFIG_NAME)):  # written by the main process
            for path in Path(save_directory).glob("*.safetensors"):
                shutil.copymode(config, path)  # safetensors lets the owner alone read its files

    def freeze_towers(self) -> None:
        """Freezes the vision tower and the language model: no gradient, evaluation mode."""
        for tower in (self.vision_tower, self.language_model):
            tower.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        frozen = [tower for tower in (self.vision_tower, self.language_model) if is_frozen(tower)]
        for tower in frozen:
            tower.eval()
        parts = [name for name in TRAINED_PARTS if getattr(self, name) is not None]
        if mode and len(frozen) < 2 and all(is_frozen(getattr(self, name)) for name in parts):
            logger.warning_once(
                f"Only the towers are trained. These parts are frozen: {', '.join(parts)}. PEFT trains and saves them "
                f"with the adapter by LoraConfig(modules_to_save={parts})."
            )
        return self

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)  # the only hook of `activation_checkpointing_enable`
        _checkpoint_frozen_layers(self.language_model)

    def describe_parameters(self) -> str:
        """One line for each part: how many parameters it has, and how many of them are trained."""
        lines = []
        for name, part in self.named_children():
            # PEFT keeps the original of each module that it trains in full.
            parameters = [p for key, p in part.named_parameters() if "original_module" not in key.split(".")]
            count = sum(p.numel() for p in parameters)
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            state = {0: "frozen", count: "trained"}.get(trained, f"{_short(trained)} of them trained")
            lines.append(f"{name}: {_short(count)} parameters, {state}")
        return "\n".join(lines)

    @torch.no_grad()
    def whiten_vision_projection(self, vision_features: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """Starts a fresh vision projection from the statistics of the vision tower's tokens; see [`whiten_inputs`].

        A trained projection would be spoilt.

        Args:
            vision_features (`torch.Tensor` of shape `(images, num_vision_tokens, vision_hidden_size)`):
                Features from [`get_vision_features`], of some hundreds of images like those to come; or an iterable of
                such tensors.

        Raises:
            ValueError: If `vision_features` has another shape, is not finite or does not vary.
        """
        batches = [vision_features] if torch.is_tensor(vision_features) else vision_features
        weight = self.vision_projection.weight
        device = None if weight.is_meta else weight.device  # an offloaded part moves its inputs itself
        try:
            whiten_inputs(self.vision_projection, (self._normalize(batch, device).flatten(0, 1) for batch in batches))
        except ValueError as error:
            raise ValueError(f"`vision_features` cannot be whitened: {error}") from error


def _checkpoint_frozen_layers(tower: nn.Module) -> None:
    """Computes the layers of a frozen tower again in the backward pass, instead of keeping their activations.

    transformers checkpoints a layer only if its `training` is True, which may switch on its dropout as well. Here a
    layer stays in evaluation mode, in both forward passes. `activation_checkpointing_enable` switches it on.
    """
    for layer in tower.modules():
        if isinstance(layer, GradientCheckpointingLayer) and getattr(layer.forward, "func", None) is not _run_frozen:
            layer.forward = partial(_run_frozen, layer, layer.forward)


def _run_frozen(layer: GradientCheckpointingLayer, forward: Any, *args: Any, **kwargs: Any) -> Any:
    # A second forward pass would write to a cache again.
    has_cache = any(isinstance(argument, Cache) for argument in (*args, *kwargs.values()))
    if layer.gradient_checkpointing and not layer.training and torch.is_grad_enabled() and not has_cache:
        # The user's `activation_checkpointing_kwargs` are in this function alone.
        return layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)
    return forward(*args, **kwargs)


def allow_missing_towers(model: PreTrainedModel, keys: tuple[list[str], list[str]]) -> None:
    """Hook of `load_state_dict`: weights without any tower are complete. `keys` are the missing and the unexpected."""
    # Parameters alone: a BatchNorm that was saved by an old PyTorch may lack a buffer.
    if {name for name, _ in model.named_parameters() if _is_towers(name)} <= set(keys[0]):
        keys[0][:] = [name for name in keys[0] if not _is_towers(name)]


def _read_config(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> EVLGenConfig:
    """Reads the configuration of a checkpoint, or takes that in the `kwargs` of `from_pretrained`.

    If the checkpoint names its towers, fields of the configuration move there from `kwargs`.
    """
    config, changes = kwargs.get("config"), {}
    if isinstance(config, PreTrainedConfig):  # of this or another copy of the code
        return config
    hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    config_dict, _ = EVLGenConfig.get_config_dict(name_or_path if config is None else config, **hub)
    if config_dict.get("towers") == "reference":
        fields = EVLGenConfig.__dataclass_fields__.keys() - {"dtype"}  # which is the towers' here
        changes = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
    for argument in TOWERS:  # another repository does not have the commit
        if f"{argument}_name_or_path" in changes:
            changes.setdefault(f"{argument}_revision", None)
    return EVLGenConfig.from_dict(config_dict, **changes)


def _quantize_only_language_model(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Changes arguments of `from_pretrained` so that their `quantization_config` skips all but the language model."""
    if kwargs.get("quantization_config") is None:
        return kwargs
    quantization_config = copy.deepcopy(kwargs["quantization_config"])
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    # transformers skips the head as well, unless it is given a list.
    skipped = ["vision_tower", *TRAINED_PARTS, "language_model.lm_head"]
    name = "llm_int8_skip_modules"  # of bitsandbytes
    name = name if hasattr(quantization_config, name) else "modules_to_not_convert"
    setattr(quantization_config, name, skipped + (getattr(quantization_config, name, None) or []))
    return {**kwargs, "quantization_config": quantization_config}


def check_disk_space(folder: str | os.PathLike, needed: float, what: str) -> None:
    """Raises an `OSError` if fewer than `needed` bytes are free where `folder` is, or will be, for `what`."""
    path = Path(folder).absolute()
    free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.is_dir())).free
    if needed > free:
        message = f"{what} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, message, str(folder))


def _is_towers(name: str) -> bool:
    return name.split(".")[0] in TOWERS.values()


def _pop_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Takes arguments with a prefix out of `kwargs`, except fields of the configuration (`vision_hidden_size` …)."""
    names = [name for name in kwargs if name.startswith(prefix) and name not in EVLGenConfig.__dataclass_fields__]
    return {name.removeprefix(prefix): kwargs.pop(name) for name in names}


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.2f} K"
