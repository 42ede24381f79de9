"""EVLGen configuration: a vision tower, a connector and a language model."""

import copy
import math
import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_connectors import CheckedConfig, TomeFormerConfig, connector_config_class, read_budgets
from .hub_code import AUTO_MAP, CUSTOM_PIPELINES, Pipelines, save_hub_code

# The paper's towers. The default configuration of transformers for the first is EVA ViT-g.
_EVA_VIT_G = {"model_type": "blip_2_vision_model"}
_OPT_2_7B = {"model_type": "opt", "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240}
_OPT_2_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32}

# These towers take images of any size. The `image_size` in their configuration is not binding.
_ANY_IMAGE_SIZE = ("dinov2", "dinov2_with_registers")

# Whether the tokens of these towers start with a class token. For other towers a dry run finds it out.
_CLASS_TOKEN = {
    "blip_2_vision_model": True,  # EVA ViT-g
    "clip_vision_model": True,
    "dinov2": True,
    "dinov2_with_registers": True,
    "siglip_vision_model": False,
    "vit": True,
}


class EVLGenConfig(CheckedConfig):
    r"""
    Configuration of [`EVLGenForConditionalGeneration`]. The defaults are the paper's model: EVA ViT-g, a TomeFormer of
    BERT-base's size and OPT-2.7b. The configuration of a checkpoint must have all three parts.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower, of any type that `AutoModel` knows or `Blip2VisionConfig` (EVA ViT-g).
        connector_config ([`ConnectorConfig`] or `dict`, *optional*):
            Configuration of the connector: [`TomeFormerConfig`], [`QFormerConnectorConfig`] or [`MLPConnectorConfig`].
            A `dict` names it by its `model_type`. By default `class_token` is set by the vision tower.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the language model, of any type that `AutoModelForCausalLM` knows.
        image_token_id (`int`, *optional*):
            Id of the placeholder token `<image>`. It is never looked up in the language model's embedding, so it may
            lie beyond it. By default it is the first id beyond.
        video_token_id (`int`, *optional*):
            Id of the placeholder token `<video>`. By default the id after that of `<image>`.
        temporal_contextualizer (`bool`, *optional*, defaults to `False`):
            Whether the frames of a video attend to each other in the vision tower (EVLGen, section 3.3). Without it, a
            video is the mean of its frames.
        temporal_hidden_size (`int`, *optional*, defaults to 256): Width of the temporal queries and keys.
        temporal_num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of the temporal attention. Must divide `temporal_hidden_size` and `vision_hidden_size`.
        temporal_frame_positions (`bool`, *optional*, defaults to `False`):
            Whether the temporal contextualizer has learned frame positions, so that it sees the order of frames. The
            paper's has none. Fresh ones are zero.
        video_mode (`str`, *optional*, defaults to `"mean"`):
            How the frames of a video become the tokens of one image. `"mean"` averages them, as in the paper.
            `"merge"` merges similar tokens, within frames and then over time, and embeds their times. It needs a
            square grid of patches and takes no temporal contextualizer.
        num_vision_tokens (`int`, *optional*):
            Number of tokens N of the vision tower for one image. Needed for towers with feature maps and for timm,
            whose `vision_config` does not determine it.
            [`EVLGenForConditionalGeneration.from_vision_text_pretrained`] measures it.
        num_image_tokens (`int`, *optional*):
            Tokens of the soft prompt of an image or video, if no number is requested. By default those that the
            connector's configuration gives. Another number needs an `image_token_range`.
        image_token_range (`list[int]`, *optional*):
            The smallest and the largest number of tokens of an image or video, if the model was trained with several.
            By default each has `num_image_tokens`.
        vision_hidden_size (`int`, *optional*): Width Dv of these tokens. Needed for the same towers.
        vision_model_name_or_path, vision_model_revision, text_model_name_or_path, text_model_revision (`str`,
        *optional*):
            The base models of the towers: repositories on the Hub and the commits that were loaded, or folders.
        vision_model_fingerprint, text_model_fingerprint (`str`, *optional*):
            SHA-256 of the base models. A checkpoint that names its towers is not loaded with others.
        adapted_towers (`list[str]`, *optional*):
            `"vision_model"`, `"text_model"` or both: the towers that an adapter was merged into. Their weights differ
            from those of their base models.
        towers (`str`, *optional*):
            `"include"` if checkpoints hold the frozen towers, `"reference"` if they only name them. By default the
            latter if both towers are repositories on the Hub. See [`~EVLGenForConditionalGeneration.save_pretrained`].

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
    num_image_tokens: int | None = None
    image_token_range: list[int] | None = None
    vision_model_name_or_path: str | None = None
    vision_model_revision: str | None = None
    text_model_name_or_path: str | None = None
    text_model_revision: str | None = None
    vision_model_fingerprint: str | None = None
    text_model_fingerprint: str | None = None
    adapted_towers: list[str] | None = None
    towers: str | None = None

    def __post_init__(self, **kwargs: Any):
        connector = self.connector_config
        class_token_is_given = not isinstance(connector, dict | None) or "class_token" in (connector or {})
        if isinstance(connector, dict | None):
            self.connector_config = connector_config_class(connector or {})(**(connector or {}))
        self._build_tower_configs()
        super().__post_init__(**kwargs)
        self.custom_pipelines = Pipelines("video-to-text" if self.is_for_videos else "image-to-text")
        connector_config_class({"model_type": self.connector_config.model_type})  # raises where it is no connector

        for name in ("num_vision_tokens", "vision_hidden_size"):
            self._check_range(name, 1)
        for name in ("temporal_hidden_size", "temporal_num_attention_heads"):
            self._check_range(name, 1)
        self._complete("num_vision_tokens", _num_vision_tokens(self.vision_config))
        self._complete("vision_hidden_size", getattr(self.vision_config, "hidden_size", None))
        self._fit_connector(class_token_is_given)
        self._check_placeholders()
        self.check_num_image_tokens()
        self._check_video_mode()
        if self.towers not in (None, "include", "reference"):
            raise ValueError(f'`towers` must be "include" or "reference", but is {self.towers!r}.')
        unknown = set(self.adapted_towers or ()) - {"vision_model", "text_model"}
        if unknown:
            raise ValueError(f'`adapted_towers` holds "vision_model" and "text_model", but has {sorted(unknown)}.')
        if self.temporal_contextualizer:
            for name in ("temporal_hidden_size", "vision_hidden_size"):
                if getattr(self, name) % self.temporal_num_attention_heads:
                    raise ValueError(
                        f"`{name}` ({getattr(self, name)}) must be a multiple of `temporal_num_attention_heads` "
                        f"({self.temporal_num_attention_heads})."
                    )

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
            raise ValueError(
                f"`{name}` is needed: the configuration of a {self.vision_config.model_type!r} does not determine it. "
                "`EVLGenForConditionalGeneration.from_vision_text_pretrained` measures it."
            )
        fixed = name != "num_vision_tokens" or self.vision_config.model_type not in _ANY_IMAGE_SIZE
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
            raise ValueError(
                "`connector_config.class_token` is True, but a vision tower of type "
                f"{self.vision_config.model_type!r} has no class token."
            )
        limit = connector.max_position_embeddings
        if limit is not None and tokens > limit:
            raise ValueError(
                f"The vision tower gives {tokens} tokens, more than `connector_config.max_position_embeddings` "
                f"({limit})."
            )
        grid = getattr(connector, "position_grid_size", None)
        if grid is not None and grid**2 + int(connector.class_token) != tokens:
            raise ValueError(
                f"`connector_config.position_grid_size` is {grid}, but the vision tower gives {tokens} tokens, with "
                f"{'a' if connector.class_token else 'no'} class token. Give this tower's grid, or null for positions "
                "that start independent of each other."
            )
        connector.default_budget(tokens)  # raises where tokens cannot be pooled

    def check_num_image_tokens(self) -> None:
        """Sets `num_image_tokens` where it is None.

        Raises:
            ValueError: If the connector cannot make this number or an end of the range, or the range does not hold it.
        """
        own = self.connector_config.default_budget(self.num_vision_tokens)
        self.num_image_tokens = own if self.num_image_tokens is None else self.num_image_tokens
        if self.image_token_range is None:
            if self.num_image_tokens != own:
                raise ValueError(
                    f"`num_image_tokens` is {self.num_image_tokens}, but the connector makes {own} tokens. Another "
                    "number needs an `image_token_range`."
                )
            return
        low, high = self.image_token_range if len(self.image_token_range) == 2 else (1, 0)
        if not low <= self.num_image_tokens <= high:
            raise ValueError(
                "`image_token_range` must hold the smallest and the largest number of tokens, with "
                f"`num_image_tokens` ({self.num_image_tokens}) between them, but is {self.image_token_range}."
            )
        for budget in (low, self.num_image_tokens, high):
            try:
                self.connector_config.check_budget(budget, self.num_vision_tokens)
            except ValueError as error:
                raise ValueError(f"`image_token_range` is {self.image_token_range}: {error}") from error

    def read_budgets(self, name: str, given: Any, count: int) -> list[int]:
        """The number of tokens of each of `count` images or videos, as [`read_budgets`] reads the argument `name`."""
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
            raise ValueError(
                '`video_mode` must be "mean" with a `temporal_contextualizer`: its frames are encoded together, and '
                "those that are merged one after the other."
            )
        if getattr(self.connector_config, "pool_size", None) is not None:
            raise ValueError(
                '`video_mode` must be "mean" with `connector_config.pool_size`: merged tokens form no grid to pool.'
            )
        self.check_square_grid('`video_mode` "merge"')

    def check_square_grid(self, name: str) -> None:
        """Checks that the patches of the vision tower form a square. `name` is what needs it, for the error.

        The configuration of a vision transformer states its grid. Of other towers, and of timm's, only the number of
        patches is known.

        Raises:
            ValueError: If the grid is not square, or the number of patches is no square number.
        """
        patches = self.num_vision_tokens - int(self.connector_config.class_token)
        shown, is_square = str(patches), math.isqrt(patches) ** 2 == patches
        if self.vision_config.model_type in _CLASS_TOKEN:
            rows, columns = _patch_grid(self.vision_config)
            if rows * columns == patches:  # otherwise the images have another size than the configuration's
                shown, is_square = f"{rows} x {columns}", rows == columns
        if not is_square:
            raise ValueError(
                f"{name} needs a vision tower with a square grid of patches, but this one gives {shown} patches."
            )

    def check_tiles(self, name: str = "`max_tiles` above 1") -> None:
        """
        Raises:
            ValueError: If the model cannot take images of several tiles, because of its vision tower or connector. The
                message starts with `name`.
        """
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
        for name in ("image_token_id", "video_token_id"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, but is {getattr(self, name)}.")
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"`image_token_id` and `video_token_id` must differ, but both are {self.image_token_id}.")

    @property
    def is_for_videos(self) -> bool:
        """Whether the model has parts for videos. A model without them takes videos as the mean of their frames."""
        return self.temporal_contextualizer or self.video_mode == "merge"

    def to_dict(self) -> dict[str, Any]:
        # transformers adds only the class that is saved to `auto_map`, so the whole map is written here. These are
        # copies, as `pipeline` changes what it reads.
        config = super().to_dict()
        for part in ("vision_config", "text_config"):
            config[part].pop("_name_or_path", None)  # `vision_model_name_or_path` and its peer name the base models
        if self.image_token_range is None:  # the connector's configuration has it, and may be changed
            config.pop("num_image_tokens", None)
        return {**config, "auto_map": dict(AUTO_MAP), "custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EVLGenConfig":
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"The checkpoint's `model_type` is {model_type!r}, but an {cls.model_type!r} is wanted.")
        if "default_num_image_tokens" in config_dict:  # the name in older checkpoints
            config_dict = {"num_image_tokens": config_dict["default_num_image_tokens"], **config_dict}
            config_dict.pop("default_num_image_tokens")
        # `EVLGenConfig()` fills missing parts with the paper's. A checkpoint without one is damaged.
        missing = [name for name in cls.sub_configs if {**config_dict, **kwargs}.get(name) is None]
        if missing:
            raise ValueError(f"The configuration of a checkpoint must have {', '.join(missing)}, which is missing.")
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves config.json and the code that it names, for `AutoConfig` with `trust_remote_code=True`."""
        os.makedirs(save_directory, exist_ok=True)
        save_hub_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _num_vision_tokens(vision_config: PreTrainedConfig) -> int | None:
    """Returns the number of tokens of one image, class and register tokens included, if the configuration has it."""
    if vision_config.model_type not in _CLASS_TOKEN:
        return None
    sizes = vision_config.image_size, vision_config.patch_size
    if None in sizes or min(*_pair(sizes[0]), *_pair(sizes[1])) < 1:
        raise ValueError(
            "`vision_config` must have an `image_size` and a `patch_size` of at least 1, but has "
            f"{sizes[0]} and {sizes[1]}."
        )
    prefix = int(_CLASS_TOKEN[vision_config.model_type]) + getattr(vision_config, "num_register_tokens", 0)
    return math.prod(_patch_grid(vision_config)) + prefix


def _patch_grid(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """Returns the rows and columns of patches of an image of the configuration's size."""
    (height, width), (patch_height, patch_width) = _pair(vision_config.image_size), _pair(vision_config.patch_size)
    return height // patch_height, width // patch_width


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
