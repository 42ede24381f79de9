"""EVLGen configuration: a vision tower, a TomeFormer connector and a language model."""

import copy
import os
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

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


class TomeFormerConfig(PreTrainedConfig):
    r"""
    Configuration of the TomeFormer, a BERT encoder that merges similar tokens in every layer (EVLGen, section 3.2).

    The fields of BERT have BERT's names and `bert-base-uncased`'s defaults.

    Args:
        hidden_size (`int`, defaults to 768): Width D of the tokens.
        num_hidden_layers (`int`, defaults to 12): Number of layers L.
        num_attention_heads (`int`, defaults to 12): Heads of each layer; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 3072): Width of the feed-forward part.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the feed-forward part, a key of transformers' `ACT2FN`.
        hidden_dropout_prob (`float`, defaults to 0.1): Dropout after the embeddings and in both residual branches.
        attention_probs_dropout_prob (`float`, defaults to 0.1): Dropout of the attention probabilities.
        max_position_embeddings (`int`, defaults to 512): Largest number of input tokens.
        type_vocab_size (`int`, defaults to 2): Rows of the token-type table, of which the first is used.
        layer_norm_eps (`float`, defaults to 1e-12): Epsilon of the LayerNorms.
        initializer_range (`float`, defaults to 0.02): Standard deviation of freshly initialised weights.
        position_initializer_range (`float`, *optional*):
            Standard deviation of freshly initialised position embeddings; by default `initializer_range`. Positions
            that weigh about as much as the tokens make a fresh connector learn sooner where things are.
        merge_r (`int`, `list[int]` or `tuple[int, float]`, defaults to 19):
            Tokens to merge: the same number in every layer; or one number per layer, padded with zeros; or a pair
            `(r, inflection)`, for numbers that change linearly around `r` from `r * (1 - inflection)` in the first
            layer to `r * (1 + inflection)` in the last (ToMe's schedules). A pair is turned into a list at once,
            since JSON does not tell the two apart.
        class_token (`bool`, defaults to `True`): Whether token 0 is a class token, which is never merged.
        pre_norm (`bool`, defaults to `False`):
            `False` is BERT's block, which normalises after each residual sum. `True` normalises the input of each
            residual branch instead, so the residual path, and with it the merging, is left alone.
        layer_scale_init_value (`float`, *optional*):
            If given, each residual branch is scaled by learned per-channel gains that start at this value (LayerScale,
            Touvron et al., ICCV 2021). With `pre_norm=True` and 0.0 the TomeFormer starts as pure token merging
            behind the embeddings' LayerNorm.

    Raises:
        ValueError: If a field is out of range; the message names it.
    """

    model_type = "tomeformer"
    base_config_key = "connector_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    position_initializer_range: float | None = None
    merge_r: int | list[int] | tuple[int, float] = 19
    class_token: bool = True
    pre_norm: bool = False
    layer_scale_init_value: float | None = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if isinstance(self.merge_r, tuple):
            self.merge_r = _linear_schedule(*self.merge_r, self.num_hidden_layers)
        requested = self.merge_r if isinstance(self.merge_r, list) else [self.merge_r]
        if any(not isinstance(r, int) or isinstance(r, bool) or r < 0 for r in requested):
            raise ValueError(f"`merge_r` must hold integers of 0 or more, but is {self.merge_r}.")
        if len(requested) > self.num_hidden_layers:
            raise ValueError(f"`merge_r` has {len(requested)} entries for {self.num_hidden_layers} layers.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "TomeFormerConfig":
        # Fields go through the checks of `__post_init__`; left to transformers, they would be set afterwards.
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__dataclass_fields__}
        return super().from_dict({**config_dict, **fields}, **kwargs)

    def merge_schedule(self, num_tokens: int) -> list[int]:
        """Tokens really merged in each layer, of `num_tokens` at the start: no layer merges more than half of its own.

        Returns:
            `list[int]` with `num_hidden_layers` entries.
        """
        requested = self.merge_r
        if isinstance(requested, int):
            requested = [requested] * self.num_hidden_layers
        requested = requested + [0] * (self.num_hidden_layers - len(requested))

        schedule, remaining = [], num_tokens
        for r in requested:
            schedule.append(min(r, (remaining - int(self.class_token)) // 2))
            remaining -= schedule[-1]
        return schedule

    def num_output_tokens(self, num_tokens: int) -> int:
        """Tokens left of `num_tokens` input tokens behind the last layer."""
        return num_tokens - sum(self.merge_schedule(num_tokens))


class EVLGenConfig(PreTrainedConfig):
    r"""
    Configuration of [`EVLGenForConditionalGeneration`]. The defaults are the paper's model: EVA ViT-g, a TomeFormer of
    BERT-base's size and OPT-2.7b.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower, of any type that `AutoModel` knows or `Blip2VisionConfig` (EVA ViT-g).
        connector_config ([`TomeFormerConfig`] or `dict`, *optional*):
            Configuration of the connector. Where it does not say `class_token`, the vision tower does.
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
            The base models that the towers came from, and their revisions.

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

    def __post_init__(self, **kwargs: Any):
        connector_says = not isinstance(self.connector_config, dict | None) or "class_token" in (
            self.connector_config or {}
        )
        super().__post_init__(**kwargs)

        self._settle("num_vision_tokens", _num_vision_tokens(self.vision_config))
        self._settle("vision_hidden_size", getattr(self.vision_config, "hidden_size", None))
        has_class_token = _CLASS_TOKEN.get(self.vision_config.model_type)
        if has_class_token is not None and not connector_says:
            self.connector_config.class_token = has_class_token
        if has_class_token is False and self.connector_config.class_token:
            raise ValueError(
                "`connector_config.class_token` is True, but a vision tower of type "
                f"{self.vision_config.model_type!r} has no class token."
            )
        if self.num_vision_tokens > self.connector_config.max_position_embeddings:
            raise ValueError(
                f"The vision tower gives {self.num_vision_tokens} tokens, more than "
                f"`connector_config.max_position_embeddings` ({self.connector_config.max_position_embeddings})."
            )
        if self.image_token_id is None:
            self.image_token_id = self.text_config.get_text_config().vocab_size
        if self.video_token_id is None:
            self.video_token_id = self.image_token_id + 1
        for name in ("image_token_id", "video_token_id"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, but is {getattr(self, name)}.")
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"`image_token_id` and `video_token_id` must differ, but both are {self.image_token_id}.")
        if self.temporal_contextualizer:
            for name in ("temporal_hidden_size", "vision_hidden_size"):
                if getattr(self, name) % self.temporal_num_attention_heads:
                    raise ValueError(
                        f"`{name}` ({getattr(self, name)}) must be a multiple of `temporal_num_attention_heads` "
                        f"({self.temporal_num_attention_heads})."
                    )

    def _settle(self, name: str, told: int | None) -> None:
        """Takes field `name` from what the vision tower's configuration tells, and checks one against the other."""
        given = getattr(self, name)
        if given is None and told is None:
            raise ValueError(
                f"`{name}` is needed: a vision tower of type {self.vision_config.model_type!r} does not tell it. "
                "`EVLGenForConditionalGeneration.from_vision_text_pretrained` finds it out."
            )
        fixed = name != "num_vision_tokens" or self.vision_config.model_type not in _ANY_IMAGE_SIZE
        if fixed and None not in (given, told) and given != told:
            raise ValueError(f"`{name}` is {given}, but the vision tower's configuration says {told}.")
        setattr(self, name, told if given is None else given)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the soft prompt for one image: what the connector leaves of the vision tower's tokens."""
        return self.connector_config.num_output_tokens(self.num_vision_tokens)

    def to_dict(self) -> dict[str, Any]:
        # Written here, since transformers records only the class that is saved, and `pipeline` changes what it reads.
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP), "custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EVLGenConfig":
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"The checkpoint's `model_type` is {model_type!r}, but an {cls.model_type!r} is wanted.")
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves config.json and the code that it names, for `AutoConfig` with `trust_remote_code=True`."""
        os.makedirs(save_directory, exist_ok=True)
        save_hub_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _linear_schedule(r: int, inflection: float, num_layers: int) -> list[int]:
    """ToMe's `parse_r` (facebookresearch/ToMe, tome/utils.py) for a pair, for any number of layers, one included."""
    if num_layers == 1:
        return [int(r)]
    first = int(r * (1.0 - inflection))
    last = 2 * r - first
    return [int(first + (last - first) * layer / (num_layers - 1)) for layer in range(num_layers)]


def _num_vision_tokens(vision_config: PreTrainedConfig) -> int | None:
    """Tokens of one image, class and register tokens included; None where the tower's configuration does not tell."""
    if vision_config.model_type not in _CLASS_TOKEN:
        return None
    height, width = _pair(vision_config.image_size)
    patch_height, patch_width = _pair(vision_config.patch_size)
    prefix = int(_CLASS_TOKEN[vision_config.model_type]) + getattr(vision_config, "num_register_tokens", 0)
    return (height // patch_height) * (width // patch_width) + prefix


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
