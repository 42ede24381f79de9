"""EVLGen configuration: a vision tower, a connector and a language model."""

import copy
import math
import os
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, resolve_trust_remote_code
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .configuration_connectors import CONNECTOR_CONFIGS, CheckedConfig, TomeFormerConfig, connector_config_class
from .hub_code import AUTO_MAP, CUSTOM_PIPELINES, Pipelines, save_hub_code

# The paper's towers. The default configuration of transformers for the first is EVA ViT-g.
_EVA_VIT_G = {"model_type": "blip_2_vision_model"}
_OPT_2_7B = {"model_type": "opt", "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240}
_OPT_2_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32}

# Whether the tokens of these towers start with a class token. For other towers a dry run finds it out.
_CLASS_TOKEN = {
    "blip_2_vision_model": True,  # EVA ViT-g
    "clip_vision_model": True,
    "dinov2": True,
    "dinov2_with_registers": True,
    "siglip_vision_model": False,
    "vit": True,
}


def read_budgets(
    name: str, given: Any, count: int, default: int | None, image_token_range: Sequence[int] | None
) -> list[int]:
    """The number of tokens of each of `count` images or videos: those given, or `default`.

    `given` is an integer for all, or one for each in a sequence or a tensor. `name` is the argument's in messages. The
    range holds the smallest and the largest number allowed, by default any. Raises a ValueError if it is no such pair,
    or if a number is no integer, below 1 or out of the range, or there is not one for each.
    """
    budgets = given.tolist() if hasattr(given, "tolist") else given  # a tensor
    budgets = default if budgets is None else budgets
    is_sequence = isinstance(budgets, list | tuple)
    numbers = [n.item() if hasattr(n, "item") else n for n in budgets] if is_sequence else [budgets]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 1 for number in numbers):
        raise ValueError(f"`{name}` must be an integer of 1 or more, or a list of these, but is {budgets!r}.")
    if is_sequence and len(numbers) != count:
        raise ValueError(f"`{name}` holds {len(numbers)} numbers, but there are {count} images or videos.")
    low, high = 1, math.inf
    if image_token_range is not None:
        limits = list(image_token_range) if isinstance(image_token_range, list | tuple) else []
        if [type(limit) for limit in limits] != [int, int] or not 1 <= limits[0] <= limits[1]:
            wanted = "the smallest and the largest number of tokens, integers of 1 or more"
            raise ValueError(f"`image_token_range` must hold {wanted}, but is {image_token_range!r}.")
        low, high = limits
    if not all(low <= number <= high for number in numbers):
        raise ValueError(f"`{name}` must be from {low} to {high}, as the model was trained, but is {budgets}.")
    return numbers if is_sequence else numbers * count


class EVLGenConfig(CheckedConfig):
    r"""Configuration of [`EVLGenForConditionalGeneration`]. That of a checkpoint must have all three parts.

    The defaults are the paper's model: EVA ViT-g, a TomeFormer of BERT-base's size and OPT-2.7b.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower, of any type that `AutoModel` knows or `Blip2VisionConfig` (EVA ViT-g).
        connector_config ([`ConnectorConfig`] or `dict`, *optional*):
            Configuration of the connector: [`TomeFormerConfig`], [`QFormerConnectorConfig`] or [`MLPConnectorConfig`].
            A `dict` names it by its `model_type`. By default `class_token` is set by the vision tower.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the language model, of any type that `AutoModelForCausalLM` knows.
        image_token_id (`int`, *optional*):
            Id of the placeholder `<image>`, by default the first beyond the language model's embedding. It is never
            looked up there.
        video_token_id (`int`, *optional*): Id of the placeholder `<video>`, by default the next one.
        temporal_contextualizer (`bool`, *optional*, defaults to `False`):
            Whether the frames of a video attend to each other in the vision tower (EVLGen, section 3.3).
        temporal_hidden_size (`int`, *optional*, defaults to 256): Width of the temporal queries and keys.
        temporal_num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of the temporal attention. Must divide `temporal_hidden_size` and `vision_hidden_size`.
        temporal_frame_positions (`bool`, *optional*, defaults to `False`):
            Whether the contextualizer has learned frame positions, which the paper's has not. Fresh ones are zero.
        video_mode (`str`, *optional*, defaults to `"mean"`):
            How frames become the tokens of one image. `"mean"` averages them, as in the paper. `"merge"` merges
            similar tokens, within frames and then over time, and embeds their times. It needs a square grid.
        num_vision_tokens (`int`, *optional*):
            Number of tokens N of the vision tower for one image. Needed for towers with feature maps and for timm's,
            of which [`EVLGenForConditionalGeneration.from_vision_text_pretrained`] measures it.
        image_token_range (`list[int]`, *optional*):
            The smallest and the largest number of tokens of an image or video, if the model was trained with several.
            By default each has `num_image_tokens`.
        default_num_image_tokens (`int`, *optional*):
            Tokens of an image or video if no number is requested, in `image_token_range`. By default those that the
            connector's configuration gives.
        vision_hidden_size (`int`, *optional*): Width Dv of the tower's tokens. Needed for the same towers.
        vision_model_name_or_path, vision_model_revision, and so for `text_model` (`str`, *optional*):
            The base models of the towers: repositories on the Hub and the commits that were loaded, or folders.
        vision_model_fingerprint, text_model_fingerprint (`str`, *optional*):
            SHA-256 of the base models. A checkpoint that names its towers is not loaded with others.
        adapted_towers (`list[str]`, *optional*):
            The towers that an adapter was merged into, of `"vision_model"` and `"text_model"`.
        training_data (`list[str]`, *optional*):
            Names of the data sets that the model was trained on, as the scripts note them for its card and its page.
        towers (`str`, *optional*):
            `"include"` if checkpoints hold the frozen towers, `"reference"` if they only name them. See
            [`~EVLGenForConditionalGeneration.save_pretrained`] for the default.

    Raises:
        TypeError: If a field has a wrong type; the message names it.
        ValueError: If a field is out of range, or the parts do not fit each other; the message names the field.
    """

    model_type = "evlgen"
    sub_configs = {"vision_config": AutoConfig, "connector_config": TomeFormerConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    connector_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    temporal_contextualizer: bool = False
    temporal_hidden_size: int = 256
    temporal_num_attention_heads: int = 8
    temporal_frame_positions: bool = False
    video_mode: str = "mean"
    num_vision_tokens: int | None = None
    vision_hidden_size: int | None = None
    image_token_range: list[int] | None = None
    default_num_image_tokens: int | None = None
    vision_model_name_or_path: str | None = None
    vision_model_revision: str | None = None
    text_model_name_or_path: str | None = None
    text_model_revision: str | None = None
    vision_model_fingerprint: str | None = None
    text_model_fingerprint: str | None = None
    adapted_towers: list[str] | None = None
    training_data: list[str] | None = None
    towers: str | None = None

    def __post_init__(self, **kwargs: Any):
        class_token_is_given = True
        if isinstance(self.connector_config, dict | None):
            fields = self.connector_config or {}
            class_token_is_given = "class_token" in fields
            self.connector_config = connector_config_class(fields)(**fields)
        self._build_tower_configs()
        super().__post_init__(**kwargs)
        self.custom_pipelines = Pipelines("video-to-text" if self.is_for_videos else "image-to-text")
        connector_config_class({"model_type": self.connector_config.model_type})  # raises where it is no connector

        self._complete("num_vision_tokens", _num_vision_tokens(self.vision_config))
        self._complete("vision_hidden_size", getattr(self.vision_config, "hidden_size", None))
        self._fit_connector(class_token_is_given)
        self._check_placeholders()
        self.check_num_image_tokens()
        self._check_video_mode()
        if self.towers not in (None, "include", "reference"):
            raise ValueError(f'`towers` must be "include" or "reference", but is {self.towers!r}.')
        if unknown := set(self.adapted_towers or ()) - {"vision_model", "text_model"}:
            raise ValueError(f'`adapted_towers` holds "vision_model" and "text_model", but has {sorted(unknown)}.')
        heads = self.temporal_num_attention_heads
        for name in ("temporal_hidden_size", "vision_hidden_size") if self.temporal_contextualizer else ():
            size = getattr(self, name)
            if size % heads:
                raise ValueError(f"`{name}` ({size}) must be a multiple of `temporal_num_attention_heads` ({heads}).")

    def _build_tower_configs(self) -> None:
        """Turns dictionaries into configurations of transformers. Its own errors do not name the part."""
        for name, defaults in (("vision_config", _EVA_VIT_G), ("text_config", _OPT_2_7B)):
            fields = getattr(self, name)
            if not isinstance(fields, dict | None):
                continue
            fields = defaults if fields is None else {"model_type": defaults["model_type"], **fields}
            try:
                setattr(self, name, AutoConfig.for_model(**fields))
            except (TypeError, ValueError, StrictDataclassError) as error:
                raise ValueError(f"`{name}` cannot be used: {error}") from error

    def _complete(self, name: str, expected: int | None) -> None:
        """Sets a field that the vision tower's configuration determines, or checks it where it is given."""
        given = getattr(self, name)
        if given is None and expected is None:
            tower = f"the configuration of a {self.vision_config.model_type!r}"
            raise ValueError(f"`{name}` is needed: {tower} lacks it. `from_vision_text_pretrained` measures it.")
        # DINOv2 takes images of any size. The `image_size` in its configuration is not binding.
        fixed = name != "num_vision_tokens" or not self.vision_config.model_type.startswith("dinov2")
        if fixed and None not in (given, expected) and given != expected:
            raise ValueError(f"`{name}` is {given}, but must be {expected} by the vision tower's configuration.")
        setattr(self, name, expected if given is None else given)

    def _fit_connector(self, class_token_is_given: bool) -> None:
        """Adapts the connector to the vision tower's class token, and refuses one that cannot take its tokens."""
        connector, tokens = self.connector_config, self.num_vision_tokens
        has_class_token = _CLASS_TOKEN.get(self.vision_config.model_type)
        if has_class_token is not None and not class_token_is_given:
            connector.class_token = has_class_token
        if has_class_token is False and connector.class_token:
            tower = f"a vision tower of type {self.vision_config.model_type!r}"
            raise ValueError(f"`connector_config.class_token` is True, but {tower} has no class token.")
        limit = connector.max_position_embeddings
        if limit is not None and tokens > limit:
            limit = f"`connector_config.max_position_embeddings` ({limit})"
            raise ValueError(f"The vision tower gives {tokens} tokens, more than {limit}.")
        grid = getattr(connector, "position_grid_size", None)
        if grid is not None and grid**2 + int(connector.class_token) != tokens:
            raise ValueError(
                f"`connector_config.position_grid_size` is {grid}, but the vision tower gives {tokens} tokens, with "
                f"{'a' if connector.class_token else 'no'} class token. Give this tower's grid, or null."
            )

    def check_num_image_tokens(self) -> None:
        """Checks `image_token_range` and `default_num_image_tokens`. Raises a ValueError if one cannot be."""
        self.connector_config.default_budget(self.num_vision_tokens)  # raises where tokens cannot be pooled
        if self.image_token_range is None:
            if self.default_num_image_tokens is not None:
                raise ValueError("`default_num_image_tokens` needs an `image_token_range`, the numbers in training.")
            return
        try:
            self.read_budgets("num_image_tokens", None, 1)  # raises where the range is none, or lacks the number
            for budget in (*self.image_token_range, self.num_image_tokens):
                self.connector_config.check_budget(budget, self.num_vision_tokens)
        except ValueError as error:
            raise ValueError(f"`image_token_range` is {self.image_token_range}: {error}") from error

    def read_budgets(self, name: str, given: Any, count: int) -> list[int]:
        """The numbers of tokens of `count` images or videos, as the function [`read_budgets`] returns them."""
        limits = self.image_token_range or [self.num_image_tokens] * 2
        return read_budgets(name, given, count, self.num_image_tokens, limits)

    def _check_video_mode(self) -> None:
        if self.video_mode not in ("mean", "merge"):
            raise ValueError(f'`video_mode` must be "mean" or "merge", but is {self.video_mode!r}.')
        if self.temporal_frame_positions and not self.temporal_contextualizer:
            raise ValueError("`temporal_frame_positions` needs a `temporal_contextualizer`: it has the positions.")
        if self.video_mode == "mean":
            return
        if self.temporal_contextualizer:
            raise ValueError('`video_mode` must be "mean" with a `temporal_contextualizer`, which needs all frames.')
        if getattr(self.connector_config, "pool_size", None) is not None:
            raise ValueError('`video_mode` must be "mean" with `connector_config.pool_size`, which needs a grid.')
        self.check_square_grid('`video_mode` "merge"')

    def check_square_grid(self, name: str) -> None:
        """Raises a ValueError if the patches of the vision tower form no square. `name` is what needs one.

        The configuration of a vision transformer states its grid. Of other towers, and of timm's, only the number of
        patches is known.
        """
        patches = self.num_vision_tokens - int(self.connector_config.class_token)
        shown, is_square = f"{patches} patches", math.isqrt(patches) ** 2 == patches
        if self.vision_config.model_type in _CLASS_TOKEN:
            rows, columns = _patch_grid(self.vision_config)
            if rows * columns == patches:  # otherwise the images have another size than the configuration's
                shown, is_square = f"{rows} x {columns} patches", rows == columns
        if not is_square:
            raise ValueError(f"{name} needs a vision tower with a square grid of patches, but this one gives {shown}.")

    def check_tiles(self, name: str = "`max_tiles` above 1") -> None:
        """Raises a ValueError, which starts with `name`, if tower or connector cannot take images of several tiles."""
        self.check_square_grid(name)
        patches = self.num_vision_tokens - int(self.connector_config.class_token)
        try:
            self.connector_config.check_budget(self.num_image_tokens, self.num_vision_tokens + patches, (1, 2))
        except ValueError as error:
            raise ValueError(f"{name}: the connector takes no image of several tiles: {error}") from error

    def _check_placeholders(self) -> None:
        if self.image_token_id is None:
            self.image_token_id = self.text_config.get_text_config().vocab_size
        if self.video_token_id is None:
            self.video_token_id = self.image_token_id + 1
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"`image_token_id` and `video_token_id` must differ, but both are {self.image_token_id}.")

    @property
    def is_for_videos(self) -> bool:
        """Whether the model has parts for videos. A model without them takes videos as the mean of their frames."""
        return self.temporal_contextualizer or self.video_mode == "merge"

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the soft prompt for one image, if no number is requested."""
        return self.default_num_image_tokens or self.connector_config.default_budget(self.num_vision_tokens)

    def to_dict(self) -> dict[str, Any]:
        # transformers adds only the class that is saved to `auto_map`, so the whole map is written here. These are
        # copies, as `pipeline` changes what it reads.
        config = super().to_dict()
        for part in ("vision_config", "text_config"):
            config[part].pop("_name_or_path", None)  # `vision_model_name_or_path` and its peer name the base models
            config[part].pop("quantization_config", None)  # whoever loads the checkpoint chooses it anew
        if file := self.connector_config.model_file:
            name = self.connector_config.model_class.__name__
            config["connector_config"]["auto_map"] = {"AutoModel": f"{file.stem}.{name}"}
        return {**config, "auto_map": dict(AUTO_MAP), "custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """Reads config.json as [`~PreTrainedConfig.get_config_dict`] does, and loads a connector from its file there.

        Raises a ValueError without `trust_remote_code`, unless the user of a terminal agrees.
        """
        trusted, hub = kwargs.pop("trust_remote_code", None), dict(kwargs)
        if "_from_auto" in hub and __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            trusted = True  # AutoConfig has asked the user before it ran a checkpoint's copy of this file
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        connector = config_dict.get("connector_config") or {}
        own = (connector.get("auto_map") or {}).get("AutoModel")
        if own is not None and (trusted or connector.get("model_type") not in CONNECTOR_CONFIGS):
            from modeling_evlgen.connectors import register_connector  # which imports this package

            resolve_trust_remote_code(trusted, str(pretrained_model_name_or_path), False, True)
            register_connector(get_class_from_dynamic_module(own, pretrained_model_name_or_path, **hub))
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EVLGenConfig":
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"The checkpoint's `model_type` is {model_type!r}, but an {cls.model_type!r} is wanted.")
        # `EVLGenConfig()` fills missing parts with the paper's. A checkpoint without one is damaged.
        if missing := [name for name in cls.sub_configs if {**config_dict, **kwargs}.get(name) is None]:
            raise ValueError(f"The configuration of a checkpoint must have {', '.join(missing)}, which is missing.")
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves config.json and the code that it names, for `AutoConfig` with `trust_remote_code=True`."""
        os.makedirs(save_directory, exist_ok=True)
        file = self.connector_config.model_file
        save_hub_code(save_directory, *([file] if file else []))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _num_vision_tokens(vision_config: PreTrainedConfig) -> int | None:
    """The number of tokens of one image, class and register tokens included, if the configuration has it."""
    if vision_config.model_type not in _CLASS_TOKEN:
        return None
    sizes = vision_config.image_size, vision_config.patch_size
    if None in sizes or min(*_pair(sizes[0]), *_pair(sizes[1])) < 1:
        wanted = "an `image_size` and a `patch_size` of at least 1"
        raise ValueError(f"`vision_config` must have {wanted}, but has {sizes[0]} and {sizes[1]}.")
    prefix = int(_CLASS_TOKEN[vision_config.model_type]) + getattr(vision_config, "num_register_tokens", 0)
    return math.prod(_patch_grid(vision_config)) + prefix


def _patch_grid(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """The rows and columns of patches of an image of the configuration's size."""
    (height, width), (patch_height, patch_width) = _pair(vision_config.image_size), _pair(vision_config.patch_size)
    return height // patch_height, width // patch_width


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
