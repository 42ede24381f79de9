"""Loads any vision tower of transformers or timm, turns its output into tokens, and whitens what reads them."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, Blip2VisionConfig, Blip2VisionModel, PreTrainedConfig, PreTrainedModel

AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)  # EVA ViT-g, which `AutoModel` does not know


class TowerShape(NamedTuple):
    """The output of a vision tower for one image."""

    num_tokens: int
    hidden_size: int
    class_token: bool


def load_vision_tower(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Loads a vision tower as `from_pretrained` does. From CLIP, SigLIP or BLIP-2 it loads the vision tower alone."""
    hub_names = ("revision", "token", "cache_dir", "trust_remote_code")
    config = AutoConfig.from_pretrained(name_or_path, **{name: kwargs[name] for name in hub_names if name in kwargs})
    config = getattr(config, "vision_config", config)
    if config.model_type == "blip_2_vision_model":
        kwargs["key_mapping"] = {r"^vision_model\.": ""}
    return AutoModel.from_pretrained(name_or_path, config=config, **kwargs)


def extract_vision_tokens(tower: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Runs a vision tower over `(batch, channels, height, width)`, and returns tokens, `(batch, tokens, dim)`.

    A feature map becomes a sequence, row by row. The tokens of EVA ViT-g are those before BLIP-2's `post_layernorm`.
    That norm was trained with BLIP-2's connector and is not part of the tower. EVLGen has its own. Raises a ValueError
    if the tower returns neither tokens nor a feature map.
    """
    # Convolutions take over the memory format of the pixels. On a CPU this made EfficientNet-Lite0 1.5 times as fast.
    # The weights are saved and hashed as they are, and converting them gains nothing more.
    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    if tower.config.model_type == "blip_2_vision_model":
        return tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state  # (batch, tokens, dim)
    output = tower(pixel_values=pixel_values)
    features = output.feature_maps if "feature_maps" in output else output.last_hidden_state
    if isinstance(features, list | tuple):
        features = features[-1]  # the last of timm's feature maps
    if features.ndim == 4:
        # timm's Swin gives (batch, height, width, dim), all others (batch, dim, height, width).
        channels_last = getattr(getattr(tower, "timm_model", None), "output_fmt", "NCHW") == "NHWC"
        features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    if features.ndim != 3:
        found = f"{type(tower).__name__} returns shape {tuple(features.shape)}"
        raise ValueError(f"`vision_model` must return tokens (batch, tokens, dim) or a feature map, but {found}.")
    return features


def is_sharded(tower: nn.Module) -> bool:
    """Whether the tower's weights are sharded. Then all processes must call it equally often, to gather them."""
    # In a forward pass FSDP has gathered those outside of the layers. ZeRO-3 marks its own with a `ds_id`.
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in tower.parameters())


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of a module has a gradient."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def measure_vision_tower(config: PreTrainedConfig, image_size: int | None = None) -> TowerShape:
    """Measures the output of a tower by a dry run on the meta device, without weights or arithmetic.

    `image_size` is that of [`find_image_size`]. Raises a ValueError if the tower needs other inputs than pixels, or
    images of another size.
    """
    image_size = find_image_size(config, image_size)
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(config).eval()
        pixel_values = torch.empty(1, getattr(config, "num_channels", 3), *image_size)
        try:
            _, num_tokens, hidden_size = extract_vision_tokens(tower, pixel_values).shape
        except TypeError as error:
            raise ValueError(f"`vision_model`: {type(tower).__name__} needs more than pixels: {error}") from error
        except (ValueError, RuntimeError, AssertionError) as error:
            images = f"images of {image_size[0]} x {image_size[1]} pixels"
            raise ValueError(f"`image_size`: {type(tower).__name__} does not take {images}: {error}") from error
    return TowerShape(num_tokens, hidden_size, _has_class_token(tower, num_tokens, image_size))


def find_image_size(config: PreTrainedConfig, image_size: int | None = None) -> tuple[int, int]:
    """Returns height and width in pixels: `image_size`, or that of a tower's configuration, or 224."""
    if image_size is None:
        arguments, pretrained = (
            getattr(config, name, None) or {} for name in ("model_args", "pretrained_cfg")
        )  # timm
        of_timm = arguments.get("img_size") or tuple(pretrained.get("input_size", ()))[1:]  # channels, height, width
        image_size = getattr(config, "image_size", None) or of_timm or 224
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def _has_class_token(tower: PreTrainedModel, num_tokens: int, image_size: tuple[int, int]) -> bool:
    timm_model = getattr(tower, "timm_model", None)
    if timm_model is not None:
        return getattr(timm_model, "num_prefix_tokens", 0) > 0
    size = getattr(tower.config, "patch_size", None)
    return isinstance(size, int) and num_tokens > (image_size[0] // size) * (image_size[1] // size)


@torch.no_grad()
def whiten_inputs(linear: nn.Linear, batches: Iterable[torch.Tensor]) -> None:
    """Changes a fresh linear map with a bias so that it whitens its inputs, batches of `(tokens, dim)`, first.

    Its outputs then have mean 0, and all directions of the inputs count about the same in them. With weight W, the
    matrix M of [`whitening_matrix`] and the inputs' mean m, the weight becomes W M and the bias -W M m. Source of
    data-dependent starts: Krähenbühl et al., "Data-dependent initializations of convolutional neural networks", 2016.
    """
    mean, covariance = moments(batches)
    if linear.weight.is_meta:
        # accelerate offloaded it, and would bring the old weights back. So it stays loaded from now on. accelerate's
        # public `align_module_device` loads it for a while, and drops what is written.
        linear._hf_hook.pre_forward(linear)
        linear._hf_hook.offload = False
    weight = linear.weight.cpu().double() @ whitening_matrix(covariance)  # (out_dim, dim)
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ mean)


def moments(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(dim,)` and covariance `(dim, dim)` of batches of `(tokens, dim)`, in float64 on the CPU.

    Raises a ValueError if there are fewer than two tokens, or they are not finite or do not vary.
    """
    count, total, products = 0, 0.0, 0.0
    for tokens in batches:
        tokens = tokens.detach().cpu().double()  # some accelerators have no float64
        count += len(tokens)
        total = total + tokens.sum(dim=0)  # (dim,)
        products = products + tokens.T @ tokens  # (dim, dim)
    if count < 2:
        raise ValueError(f"A covariance needs 2 tokens or more, but there are {count}.")
    mean = total / count  # (dim,)
    covariance = products / count - torch.outer(mean, mean)  # (dim, dim)
    if not covariance.isfinite().all():
        raise ValueError("The tokens must be finite.")
    if not covariance.diagonal().mean() > 1e-12 * mean.square().mean():  # less is rounding error
        raise ValueError("The tokens must vary, but are all the same.")
    return mean, covariance


def whitening_matrix(covariance: torch.Tensor, shrinkage: float = 0.1) -> torch.Tensor:
    """The matrix that makes the directions of tokens uncorrelated, and their variances nearly 1.

    With covariance C and shrinkage s it is ((1 - s) C + s tr(C) / dim I)^(-1/2). This is ZCA whitening (Bell and
    Sejnowski, "The independent components of natural scenes are edge filters", 1997). The covariance is shrunk towards
    a multiple of the identity (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", 2004). Without the shrinkage, directions of little variance would be blown up.
    """
    values, vectors = torch.linalg.eigh(covariance)  # (dim,), (dim, dim)
    # Rounding makes some of the smallest eigenvalues negative.
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage * covariance.diagonal().mean()
    return (vectors * values.rsqrt()) @ vectors.T
