"""EVLGen configuration: a vision tower, a connector and a language model."""

import copy
import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .checked_config import CheckedConfig
from .configuration_connectors import TomeFormerConfig, connector_config_class
from .hub_code import AUTO_MAP, CUSTOM_PIPELINES, save_hub_code

# These towers take images of any size, whatever `image_size` their configuration says.
_ANY_IMAGE_SIZE = ("dinov2", "dinov2_with_registers")

# Whether the sequence of these towers starts with a class token. Of other towers EVLGen learns by a dry run.
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
    BERT-base's size and OPT-2.7b.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower, of any type that `AutoModel` knows or `Blip2VisionConfig` (EVA ViT-g).
        connector_config ([`TomeFormerConfig`] or `dict`, *optional*):
            Configuration of the connector; or of one of its peers, [`QFormerConnectorConfig`] or
            [`MLPConnectorConfig`], which a `dict` names by its `model_type`. Where it does not say `class_token`, the
            vision tower does.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the language model, of any type that `AutoModelForCausalLM` knows.
        image_token_id (`int`, *optional*):
            Id of the placeholder token `<image>`. It is never looked up in the language model's embedding and may lie
            beyond it; by default it is the first id that does.
        video_token_id (`int`, *optional*):
            Id of the placeholder token `<video>`, likewise; by default the one after `<image>`'s.
        temporal_contextualizer (`bool`, *optional*, defaults to `False`):
            Whether the frames of a video see each other inside the vision tower (EVLGen, section 3.3). Without it, a
            video is the mean of its frames.
        temporal_hidden_size (`int`, *optional*, defaults to 256): Width of the temporal queries and keys.
        temporal_num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of the temporal attention; must divide `temporal_hidden_size` and `vision_hidden_size`.
        num_vision_tokens (`int`, *optional*):
            Tokens N that the vision tower gives for one image. Needed only where `vision_config` does not tell
            (feature maps, timm); [`EVLGenForConditionalGeneration.from_vision_text_pretrained`] finds it out.
        vision_hidden_size (`int`, *optional*): Width Dv of these tokens. Needed where `num_vision_tokens` is.
        vision_model_name_or_path, vision_model_revision, text_model_name_or_path, text_model_revision (`str`,
        *optional*):
            The base models that the towers came from: repositories on the Hub and the commits that were loaded, or
            folders.
        vision_model_fingerprint, text_model_fingerprint (`str`, *optional*):
            SHA-256 over their weight files; a checkpoint that names its towers is not loaded with others.
        adapted_towers (`list[str]`, *optional*):
            `"vision_model"` and `"text_model"`, where an adapter was merged into that tower, whose weights are its
            base model's no more.
        towers (`str`, *optional*):
            Whether checkpoints hold the frozen towers, `"include"`, or only name them, `"reference"`. By default the
            latter if both towers are repositories on the Hub. See [`~EVLGenForConditionalGeneration.save_pretrained`].

    Raises:
        ValueError: If the parts do not fit each other; the message names the field.
    """

    model_type = "evlgen"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_vision_model"),
        "connector_config": SubConfigSpec(config_class=TomeFormerConfig),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="opt",
            init_kwargs={
                "hidden_size": 2560,
                "word_embed_proj_dim": 2560,
                "ffn_dim": 10240,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
            },
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    connector_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    temporal_contextualizer: bool = False
    temporal_hidden_size: int = 256
    temporal_num_attention_heads: int = 8
    num_vision_tokens: int | None = None
    vision_hidden_size: int | None = None
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
        if isinstance(connector, dict):
            self.connector_config = connector_config_class(connector)(**connector)
        self._build_tower_configs()
        super().__post_init__(**kwargs)
        connector_config_class({"model_type": self.connector_config.model_type})  # raises where it is no connector

        for name in ("num_vision_tokens", "vision_hidden_size"):
            self._check_range(name, 1)
        for name in ("temporal_hidden_size", "temporal_num_attention_heads"):
            self._check_range(name, 1)
        self._complete("num_vision_tokens", _num_vision_tokens(self.vision_config))
        self._complete("vision_hidden_size", getattr(self.vision_config, "hidden_size", None))
        self._fit_connector(class_token_is_given)
        self._check_placeholders()
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
        for name in ("vision_config", "text_config"):
            fields = getattr(self, name)
            if not isinstance(fields, dict | None):
                continue
            try:
                part, _ = self.sub_configs_defaults[name].create_subconfig(name, fields)
            except (TypeError, ValueError, StrictDataclassError) as error:
                raise ValueError(f"`{name}` cannot be used: {error}") from error
            setattr(self, name, part)

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
        connector.num_output_tokens(tokens)  # raises where tokens cannot be pooled

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
    def num_image_tokens(self) -> int:
        """Tokens of the soft prompt for one image: what the connector leaves of the vision tower's tokens."""
        return self.connector_config.num_output_tokens(self.num_vision_tokens)

    def to_dict(self) -> dict[str, Any]:
        # Written here, since transformers records only the class that is saved, and `pipeline` changes what it reads.
        config = super().to_dict()
        for part in ("vision_config", "text_config"):  # where they were loaded from is told above, as far as it is
            config[part].pop("_name_or_path", None)
        return {**config, "auto_map": dict(AUTO_MAP), "custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EVLGenConfig":
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"The checkpoint's `model_type` is {model_type!r}, but an {cls.model_type!r} is wanted.")
        # A missing part must not be taken for the paper's, as it is where a model is configured from scratch.
        missing = [name for name in cls.sub_configs_defaults if {**config_dict, **kwargs}.get(name) is None]
        if missing:
            raise ValueError(f"The configuration of a checkpoint must have {', '.join(missing)}, which is missing.")
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves config.json and the code that it names, for `AutoConfig` with `trust_remote_code=True`."""
        os.makedirs(save_directory, exist_ok=True)
        save_hub_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _num_vision_tokens(vision_config: PreTrainedConfig) -> int | None:
    """Tokens of one image, class and register tokens included; None where the tower's configuration does not tell."""
    if vision_config.model_type not in _CLASS_TOKEN:
        return None
    height, width = _pair(vision_config.image_size)
    patch_height, patch_width = _pair(vision_config.patch_size)
    if min(height, width, patch_height, patch_width) < 1:
        raise ValueError(
            f"`vision_config` must have an `image_size` and a `patch_size` of at least 1, but has "
            f"{vision_config.image_size} and {vision_config.patch_size}."
        )
    prefix = int(_CLASS_TOKEN[vision_config.model_type]) + getattr(vision_config, "num_register_tokens", 0)
    return (height // patch_height) * (width // patch_width) + prefix


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
