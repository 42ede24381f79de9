"""Configurations of the connectors: the TomeFormer, and its peers, a Q-Former and an MLP. All fields are checked."""

import inspect
import math
import os
from typing import Any

from huggingface_hub.dataclasses import type_validator
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME

# The smallest and the largest value of each numeric field. No configuration has all of these fields.
_COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_COUNTS += ("type_vocab_size", "num_query_tokens", "cross_attention_frequency", "pool_size", "num_distinctive_tokens")
_COUNTS += ("num_vision_tokens", "vision_hidden_size", "temporal_hidden_size", "temporal_num_attention_heads")
_DEVIATIONS = ("initializer_range", "position_initializer_range", "output_position_initializer_range")
_DEVIATIONS += ("branch_initializer_range", "layer_norm_eps")
_RANGES = dict.fromkeys(_COUNTS, (1, math.inf)) | dict.fromkeys(_DEVIATIONS, (0, math.inf))
_RANGES |= dict.fromkeys(("image_token_id", "video_token_id"), (0, math.inf))
_RANGES |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), (0, 1))
# Options that connectors had. Each is refused where it is set, since the model would give other words without it.
_DELETED = ("distinctive_factor", "num_merged_tokens", "size_weighting", "keep_order")


class CheckedConfig(PreTrainedConfig):
    """A configuration that checks its fields. A wrong type raises a TypeError, and a number out of range a ValueError.

    The message names the first wrong field.
    """

    def __post_init__(self, **kwargs: Any):
        for name in self.field_names():
            annotation, value = self.__dataclass_fields__[name].type, getattr(self, name)
            try:
                type_validator(name, value, annotation)
            except TypeError:
                expected = inspect.formatannotation(annotation)
                raise TypeError(f"`{name}` must be of type {expected}, but is {value!r}.") from None
            if name in _RANGES and value is not None:
                _check_range(name, value, *_RANGES[name])
        super().__post_init__(**kwargs)

    @classmethod
    def field_names(cls) -> list[str]:
        """Returns the names of the fields that only this configuration has, not every one in transformers."""
        return [name for name in cls.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """Reads config.json as [`~PreTrainedConfig.get_config_dict`] does.

        Raises a ValueError if there is none that names a model. transformers would silently build the defaults.
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


def _check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises a ValueError if a field is no finite number from `low` to `high`."""
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, but is {value}.")
    if not low <= value <= high:
        expected = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"`{name}` must be {expected}, but is {value}.")


class ConnectorConfig(CheckedConfig):
    r"""The fields that all connectors have, and the checks that several connectors need.

    Args:
        hidden_size (`int`, defaults to 768): Width D of the tokens, in and out.
        intermediate_size (`int`, defaults to 3072): Width of the feed-forward part.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the feed-forward part, a key of transformers' `ACT2FN`.
        layer_norm_eps (`float`, defaults to 1e-12): Epsilon of the LayerNorms.
        initializer_range (`float`, defaults to 0.02): Standard deviation of fresh weights.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Largest number of input tokens. None allows any number.
        class_token (`bool`, defaults to `True`): Whether token 0 is a class token.

    Raises:
        TypeError: If a field has a wrong type; the message names it. So do all configurations of connectors.
        ValueError: If a field is out of range; the message names it.
    """

    base_config_key = "connector_config"
    model_class = model_file = None  # of a connector of one's own; `register_connector` sets them

    hidden_size: int = 768
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-12
    initializer_range: float | int = 0.02
    max_position_embeddings: int | None = 512
    class_token: bool = True

    def __post_init__(self, **kwargs: Any):
        for name in _DELETED:
            value = kwargs.pop(name, None)
            if value not in (None, False):
                raise ValueError(
                    f"`connector_config` sets `{name}` to {value!r}, but EVLGen no longer has this option. Load the "
                    "checkpoint with the code that it holds: `trust_remote_code=True` without EVLGen installed."
                )
        super().__post_init__(**kwargs)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, but is {self.hidden_act!r}.")
        heads = getattr(self, "num_attention_heads", 1)
        if self.hidden_size % heads:
            width = f"`hidden_size` ({self.hidden_size})"
            raise ValueError(f"{width} must be a multiple of `num_attention_heads` ({heads}).")
        grid = getattr(self, "position_grid_size", None)
        if grid is not None and (grid < 2 or grid**2 + self.class_token > (self.max_position_embeddings or 0)):
            raise ValueError(
                "`position_grid_size` must be 2 or more, and its patches must fit `max_position_embeddings` "
                f"({self.max_position_embeddings}), but it is {grid}."
            )

    def default_budget(self, num_tokens: int) -> int:
        """Returns how many tokens the connector makes of `num_tokens` input tokens, if no number is requested."""
        raise NotImplementedError

    def check_budget(self, budget: int, num_tokens: int, tiles: tuple[int, int] = (1, 1)) -> None:
        """Raises a ValueError if the connector cannot make `budget` of `num_tokens` tokens from these tiles.

        By default it makes no other number than `default_budget`.
        """
        expected = self.default_budget(num_tokens)
        if budget != expected:
            raise ValueError(f"`num_image_tokens` must be {expected}, but is {budget}.")

    def check_inputs(self, shape: tuple[int, ...], tiles: tuple[int, int]) -> None:
        """Raises a ValueError if input tokens have another width, are too many, or no grid in each tile."""
        if len(shape) != 3 or shape[2] != self.hidden_size:
            expected = f"(batch, tokens, {self.hidden_size})"
            raise ValueError(f"`inputs_embeds` must have shape {expected}, but has {tuple(shape)}.")
        prefix, num_tiles = int(self.class_token), math.prod(tiles)
        tokens = (shape[1] - prefix) / num_tiles + prefix  # of one tile
        if self.max_position_embeddings is not None and tokens > self.max_position_embeddings:
            found = f"{tokens:g} tokens{' in each tile' * (num_tiles > 1)}"
            limit = f"`max_position_embeddings` ({self.max_position_embeddings})"
            raise ValueError(f"`inputs_embeds` has {found}, more than {limit}.")
        if num_tiles > 1 and math.isqrt(int(tokens) - prefix) ** 2 != tokens - prefix:
            found = f"{shape[1]} tokens in {tiles[0]} x {tiles[1]} tiles"
            raise ValueError(f"`tiles` must have a square grid of patches each, but {found} have none.")


class TransformerConnectorConfig(ConnectorConfig):
    """The fields that the TomeFormer and the Q-Former share, with BERT's names and `bert-base-uncased`'s values.

    Args:
        num_hidden_layers (`int`, defaults to 12): Number of layers L.
        num_attention_heads (`int`, defaults to 12): Heads of each layer. Must divide `hidden_size`.
        hidden_dropout_prob (`float`, defaults to 0.1): Dropout after the embeddings and in both residual branches.
        attention_probs_dropout_prob (`float`, defaults to 0.1): Dropout of the attention probabilities.
        position_initializer_range (`float`, *optional*):
            Standard deviation of fresh positions of the input tokens, for a TomeFormer `initializer_range` by default.
            With positions about as large as the tokens, it learns positions sooner.
        position_grid_size (`int`, *optional*):
            Patches along each side of the vision tower's square grid. If given, fresh positions are smooth over the
            grid. So the mean position of a merged token still shows where it is, and neighbours are more alike. By
            default all positions start independent of each other.
        others: As in [`ConnectorConfig`].
    """

    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    position_initializer_range: float | int | None = None
    position_grid_size: int | None = None


class TomeFormerConfig(TransformerConnectorConfig):
    r"""Configuration of the TomeFormer: a BERT encoder that merges similar tokens in each layer (EVLGen, section 3.2).

    Args:
        type_vocab_size (`int`, defaults to 2): Rows of the token-type table. Only the first is used.
        output_position_initializer_range (`float`, *optional*):
            If given, learned positions are added to the tokens after the last layer, whose standard deviation is about
            1.0; that of fresh positions is this. Each image merges other patches into a token, so positions identify
            the tokens to the language model, as the queries of a Q-Former do.
        branch_initializer_range (`float`, *optional*):
            Standard deviation of fresh linear maps at the end of residual branches. By default `initializer_range`.
            With `pre_norm=True` and 0.0, the TomeFormer starts as pure merging of normalised tokens.
        merge_r (`int`, `list[int]`, `dict[str, float]` or `tuple[int, float]`, defaults to 19):
            Number of tokens to merge (ToMe's schedules). An integer holds for every layer. A list has one number for
            each layer and is padded with zeros. With `{"r": r, "inflection": i}` or the pair `(r, i)`, numbers change
            linearly from `r * (1 - i)` in the first layer to `r * (1 + i)` in the last; it is replaced by that list.
        merge_metric (`str`, defaults to `"keys"`):
            Vectors whose similarity decides what is merged. `"keys"` are the mean of the attention's over its heads
            (ToMe, section 3, and the paper). Fresh ones blur similarity. `"hidden_states"` are its whole input.
        class_token (`bool`, defaults to `True`): Whether token 0 is a class token. It is never merged.
        pre_norm (`bool`, defaults to `False`):
            Whether a layer normalises the input of each residual branch, so that the residual path only merges tokens.
            BERT's layer normalises each residual sum.
        others: As in [`TransformerConnectorConfig`].
    """

    model_type = "tomeformer"

    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    output_position_initializer_range: float | int | None = None
    branch_initializer_range: float | int | None = None
    merge_r: int | list[int] | tuple[int, float | int] | dict[str, float | int] = 19
    merge_metric: str = "keys"
    pre_norm: bool = False

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if isinstance(self.merge_r, tuple | dict):
            self.merge_r = _linear_schedule(self.merge_r, self.num_hidden_layers)
        requested = self.merge_r if isinstance(self.merge_r, list) else [self.merge_r]
        if any(r < 0 for r in requested):
            raise ValueError(f"`merge_r` must hold integers of 0 or more, but is {self.merge_r}.")
        if self.merge_metric not in ("keys", "hidden_states"):
            raise ValueError(f'`merge_metric` must be "keys" or "hidden_states", but is {self.merge_metric!r}.')
        if len(requested) > self.num_hidden_layers:
            raise ValueError(f"`merge_r` has {len(requested)} entries for {self.num_hidden_layers} layers.")

    def token_counts(self, num_tokens: int, budget: int | None = None) -> list[int]:
        """Returns how many of `num_tokens` input tokens enter the first layer, and how many each layer leaves.

        With `merge_r` no layer merges more than half of its tokens. To a requested `budget`, each layer keeps about
        the same share of its tokens. Raises a ValueError if `budget` is out of range.
        """
        if budget is not None:
            self.check_budget(budget, num_tokens)
            share, layers = budget / num_tokens, self.num_hidden_layers
            return [round(num_tokens * share ** (layer / layers)) for layer in range(layers + 1)]
        requested = self.merge_r if isinstance(self.merge_r, list) else [self.merge_r] * self.num_hidden_layers
        counts = [num_tokens]
        for r in requested + [0] * (self.num_hidden_layers - len(requested)):
            counts.append(counts[-1] - min(r, (counts[-1] - int(self.class_token)) // 2))
        return counts

    def check_budget(self, budget: int, num_tokens: int, tiles: tuple[int, int] = (1, 1)) -> None:
        lowest = int(self.class_token) + 1
        if not lowest <= budget <= num_tokens:
            raise ValueError(f"`num_image_tokens` must be from {lowest} to {num_tokens}, but is {budget}.")

    def default_budget(self, num_tokens: int) -> int:
        return self.token_counts(num_tokens)[-1]


class QFormerConnectorConfig(TransformerConnectorConfig):
    r"""Configuration of BLIP-2's Q-Former (Li et al., ICML 2023) as a connector.

    Learned queries attend to the visual tokens in transformers' own `Blip2QFormerModel`. The fields have that model's
    names and BLIP-2's values.

    Args:
        num_query_tokens (`int`, defaults to 32): Number of queries, and so of tokens in the soft prompt.
        cross_attention_frequency (`int`, defaults to 2):
            Queries attend to visual tokens in every layer whose index is a multiple of this.
        position_initializer_range (`float`, *optional*):
            If given, learned positions are added to the visual tokens. BLIP-2 has none: the tokens of a ViT contain
            their positions. Those of a CNN do not. `position_grid_size` needs it.
        num_distinctive_tokens (`int`, *optional*):
            If given, queries attend to this many of the most distinctive visual tokens of an image, to the mean of
            all others and to a class token; see [`keep_distinctive`]. By default they attend to all, as in BLIP-2.
        others: As in [`TransformerConnectorConfig`].
    """

    model_type = "evlgen_qformer"

    num_query_tokens: int = 32
    cross_attention_frequency: int = 2
    num_distinctive_tokens: int | None = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.position_grid_size is not None and self.position_initializer_range is None:
            raise ValueError("`position_grid_size` needs `position_initializer_range`, or there are no positions.")
        if self.position_initializer_range is not None and self.max_position_embeddings is None:
            raise ValueError("`position_initializer_range` needs `max_position_embeddings`, the number of positions.")

    def default_budget(self, num_tokens: int) -> int:
        return self.num_query_tokens

    def check_budget(self, budget: int, num_tokens: int, tiles: tuple[int, int] = (1, 1)) -> None:
        if not 1 <= budget <= self.num_query_tokens:
            limit = f"`num_query_tokens` ({self.num_query_tokens})"
            raise ValueError(f"`num_image_tokens` must be from 1 to {limit}, but is {budget}.")


class MLPConnectorConfig(ConnectorConfig):
    r"""Configuration of an MLP on each visual token, as in LLaVA-1.5 (Liu et al., CVPR 2024).

    Between EVLGen's two linear projections it computes `dense_2(act(dense_1(x)))` from the normalised tokens x.

    Args:
        residual (`bool`, *optional*):
            Whether the normalised input is added to the output, by default if `branch_initializer_range` is given.
        pool_size (`int`, *optional*):
            If given, the grid of tokens is averaged to `pool_size` x `pool_size` tokens first. A class token stays.
        output_position_initializer_range (`float`, *optional*): As in [`TomeFormerConfig`].
        max_position_embeddings (`int`, *optional*):
            Largest number of input tokens, by default any, or 512 with output positions.
        branch_initializer_range (`float`, *optional*):
            Standard deviation of a fresh `dense_2`. By default `initializer_range`. With 0.0, a residual MLP starts as
            the identity.
        others: As in [`ConnectorConfig`].
    """

    model_type = "evlgen_mlp"

    max_position_embeddings: int | None = None
    residual: bool | None = None
    pool_size: int | None = None
    output_position_initializer_range: float | int | None = None
    branch_initializer_range: float | int | None = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.residual is None:
            self.residual = self.branch_initializer_range is not None
        if self.output_position_initializer_range is not None and self.max_position_embeddings is None:
            self.max_position_embeddings = 512

    def default_budget(self, num_tokens: int) -> int:
        if self.pool_size is None:
            return num_tokens
        budget = self.pool_size**2 + int(self.class_token)
        self.check_budget(budget, num_tokens)
        return budget

    def check_budget(self, budget: int, num_tokens: int, tiles: tuple[int, int] = (1, 1)) -> None:
        prefix = int(self.class_token)
        if self.pool_size is None:
            if budget != num_tokens:
                raise ValueError(f"Without `pool_size`, `num_image_tokens` must be {num_tokens}, but is {budget}.")
            return
        num_tiles = math.prod(tiles)
        side, pooled = math.isqrt((num_tokens - prefix) // num_tiles), math.isqrt(max(0, budget - prefix))
        if side**2 * num_tiles != num_tokens - prefix or side * min(tiles) < pooled:
            found = f"there are {num_tokens - prefix} patch tokens"
            raise ValueError(f"`pool_size` {pooled} needs a square grid of at least as many tokens a side; {found}.")
        if pooled < 1 or pooled**2 != budget - prefix:
            raise ValueError(f"`num_image_tokens` must be a square{' and a class token' * prefix}, but is {budget}.")


CONNECTOR_CONFIGS = {c.model_type: c for c in (TomeFormerConfig, QFormerConnectorConfig, MLPConnectorConfig)}


def connector_config_class(fields: dict[str, Any]) -> type[ConnectorConfig]:
    """Returns the configuration class that `fields` name by their `model_type`, by default the TomeFormer's.

    Raises a ValueError if there is no such connector.
    """
    model_type = fields.get("model_type", TomeFormerConfig.model_type)
    if model_type not in CONNECTOR_CONFIGS:
        known = f"one of {', '.join(CONNECTOR_CONFIGS)}"
        if "auto_map" in fields:
            known += "; or `EVLGenForConditionalGeneration.from_pretrained` needs `trust_remote_code=True`"
        raise ValueError(f"`connector_config`'s `model_type` must be {known}, but is {model_type!r}.")
    return CONNECTOR_CONFIGS[model_type]


def _linear_schedule(merge_r: tuple[int, float] | dict[str, float], num_layers: int) -> list[int]:
    """ToMe's `parse_r` (facebookresearch/ToMe, tome/utils.py) for a pair, which also works for one layer."""
    fields = dict(zip(("r", "inflection"), merge_r, strict=True)) if isinstance(merge_r, tuple) else merge_r
    if fields.keys() != {"r", "inflection"}:
        raise ValueError(f"`merge_r` must have the keys `r` and `inflection`, but has {', '.join(fields) or 'none'}.")
    r, inflection = fields["r"], fields["inflection"]
    if not isinstance(r, int) or not math.isfinite(inflection):
        raise ValueError(f"`merge_r` needs an integer `r` and a finite `inflection`, but is {merge_r}.")
    if num_layers == 1:
        return [r]
    first = int(r * (1.0 - inflection))
    last = 2 * r - first
    return [int(first + (last - first) * layer / (num_layers - 1)) for layer in range(num_layers)]
