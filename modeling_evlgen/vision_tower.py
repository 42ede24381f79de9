"""Loads any vision tower of transformers or timm, and turns its output into tokens."""

import os
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModel, Blip2VisionModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig


class TowerShape(NamedTuple):
    """The output of a vision tower for one image: N tokens of width Dv, with or without a class token in front."""

    num_tokens: int
    hidden_size: int
    class_token: bool


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a vision tower with fresh weights."""
    if config.model_type == "blip_2_vision_model":
        return Blip2VisionModel._from_config(config)  # EVA ViT-g, which `AutoModel` does not know
    return AutoModel.from_config(config)


def load_vision_tower(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Loads a vision tower. From a CLIP, SigLIP or BLIP-2 checkpoint it loads only the vision tower.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder or the name of a repository on the Hub.
        kwargs: Further arguments of `from_pretrained`, e.g. `revision`, `dtype` or `trust_remote_code`.

    Raises:
        OSError: If there is no such checkpoint.
    """
    hub_kwargs = {
        name: kwargs[name] for name in ("revision", "token", "cache_dir", "trust_remote_code") if name in kwargs
    }
    config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
    config = getattr(config, "vision_config", config)
    if config.model_type == "blip_2_vision_model":
        return Blip2VisionModel.from_pretrained(
            name_or_path, config=config, key_mapping={r"^vision_model\.": ""}, **kwargs
        )
    return AutoModel.from_pretrained(name_or_path, config=config, **kwargs)


def extract_vision_tokens(tower: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Runs a vision tower and returns its output as tokens.

    A feature map becomes a sequence, row by row. The tokens of EVA ViT-g are those before BLIP-2's `post_layernorm`.
    That norm was trained with BLIP-2's connector and is not part of the tower. EVLGen has its own.

    Args:
        tower (`PreTrainedModel`): The tower.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Images from the tower's processor.

    Returns:
        `torch.Tensor` of shape `(batch, tokens, dim)`.

    Raises:
        ValueError: If the tower returns neither tokens nor a feature map.
    """
    # Convolutions take over the memory format of the pixels. On a CPU this made EfficientNet-Lite0 1.5 times as fast.
    # The weights are saved and hashed as they are, and converting them gains nothing more (benchmarks.cnn_tower).
    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    if tower.config.model_type == "blip_2_vision_model":
        return tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state  # (batch, tokens, dim)
    output = tower(pixel_values=pixel_values)
    features = output.feature_maps if "feature_maps" in output else output.last_hidden_state
    if isinstance(features, list | tuple):
        features = features[-1]  # the last of timm's feature maps
    if features.ndim == 4 and _gives_channels_last(tower):  # (batch, height, width, dim)
        features = features.flatten(1, 2)
    elif features.ndim == 4:  # (batch, dim, height, width)
        features = features.flatten(2).transpose(1, 2)
    if features.ndim != 3:
        raise ValueError(
            "`vision_model` must return tokens (batch, tokens, dim) or a feature map (batch, dim, height, width), "
            f"but {type(tower).__name__} returns shape {tuple(features.shape)}."
        )
    return features


def _gives_channels_last(tower: PreTrainedModel) -> bool:
    """Whether feature maps have shape (batch, height, width, dim), like those of timm's Swin."""
    return getattr(getattr(tower, "timm_model", None), "output_fmt", "NCHW") == "NHWC"


def measure_vision_tower(config: PreTrainedConfig, image_size: int | None = None) -> TowerShape:
    """Measures the output of a tower by a dry run on the meta device, without weights or arithmetic.

    Args:
        config (`PreTrainedConfig`): The tower's configuration.
        image_size (`int`, *optional*):
            Height and width of the images in pixels. By default those of the configuration, or 224.

    Raises:
        ValueError: If the tower needs other inputs than pixels, or returns neither tokens nor a feature map.
    """
    image_size = find_image_size(config, image_size)
    with torch.device("meta"), torch.no_grad():
        tower = build_vision_tower(config).eval()
        pixel_values = torch.empty(1, getattr(config, "num_channels", 3), *image_size)
        try:
            _, num_tokens, hidden_size = extract_vision_tokens(tower, pixel_values).shape
        except TypeError as error:
            raise ValueError(f"`vision_model`: {type(tower).__name__} needs more than pixels: {error}") from error
    return TowerShape(num_tokens, hidden_size, _has_class_token(tower, num_tokens, image_size))


def find_image_size(config: PreTrainedConfig, image_size: int | None = None) -> tuple[int, int]:
    """Returns height and width in pixels: `image_size`, or that of a tower's configuration, or 224."""
    if image_size is None:
        image_size = getattr(config, "image_size", None) or _timm_image_size(config) or 224
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def _has_class_token(tower: PreTrainedModel, num_tokens: int, image_size: tuple[int, int]) -> bool:
    timm_model = getattr(tower, "timm_model", None)
    if timm_model is not None:
        return getattr(timm_model, "num_prefix_tokens", 0) > 0
    patch_size = getattr(tower.config, "patch_size", None)
    if not isinstance(patch_size, int):
        return False
    return num_tokens > (image_size[0] // patch_size) * (image_size[1] // patch_size)


def _timm_image_size(config: PreTrainedConfig) -> int | tuple[int, int] | None:
    image_size = (getattr(config, "model_args", None) or {}).get("img_size")
    if image_size is not None:
        return image_size
    input_size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")  # channels, height, width
    return tuple(input_size[1:]) if input_size else None
