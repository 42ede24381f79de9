"""The peers of the TomeFormer: BLIP-2's Q-Former, which may choose tokens, an MLP, and connectors of one's own.

A connector takes `inputs_embeds`, (batch, tokens, dim), the grid of tiles that they come from, and a number of output
tokens. It returns an output with `last_hidden_state`, (batch, output tokens, dim).
"""

import inspect
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput

from configuration_evlgen.configuration_connectors import (
    CONNECTOR_CONFIGS,
    ConnectorConfig,
    MLPConnectorConfig,
    QFormerConnectorConfig,
    TransformerConnectorConfig,
)
from configuration_evlgen.hub_code import check_file

from .token_merging import keep_distinctive
from .tomeformer import (
    BranchLinear,
    ConnectorPreTrainedModel,
    PositionEmbeddings,
    TomeFormerModel,
    build_output_positions,
)


@dataclass
class QFormerConnectorOutput(BaseModelOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, queries, hidden_size)`): The queries after the last layer.
        layer_index (`tuple[torch.LongTensor]`, *optional*):
            If the connector chooses, one tensor of shape `(batch, tokens)`: the index of each visual token among those
            that the queries attend to. Tokens that were not chosen have the index of their mean, which comes first,
            after a class token. If all were chosen, there is no mean.
    """

    layer_index: tuple[torch.Tensor, ...] | None = None


class QFormerConnector(ConnectorPreTrainedModel):
    """BLIP-2's Q-Former: learned queries that attend to the visual tokens, or to the most distinctive of them.

    The layers are transformers' own.
    """

    config: QFormerConnectorConfig
    base_model_prefix = "qformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^(bert\.)?embeddings\.", r"pooler\.", r"cls\."]
    # Renames the weights of a BERT.
    bert_names = {
        r"^(?:bert\.)?embeddings\.LayerNorm\.(?:weight|gamma)$": "qformer.layernorm.weight",
        r"^(?:bert\.)?embeddings\.LayerNorm\.(?:bias|beta)$": "qformer.layernorm.bias",
        r"^(?:bert\.)?encoder\.layer\.(\d+)\.attention\.self\.": r"qformer.encoder.layer.\1.attention.attention.",
        r"^(?:bert\.)?encoder\.layer\.(\d+)\.attention\.output\.": r"qformer.encoder.layer.\1.attention.output.",
        r"^(?:bert\.)?encoder\.layer\.(\d+)\.intermediate\.": r"qformer.encoder.layer.\1.intermediate_query.",
        r"^(?:bert\.)?encoder\.layer\.(\d+)\.output\.": r"qformer.encoder.layer.\1.output_query.",
    }

    def __init__(self, config: QFormerConnectorConfig):
        super().__init__(config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size))
        self.position_embeddings = None
        if config.position_initializer_range is not None:
            sizes, std = (config.max_position_embeddings, config.hidden_size), config.position_initializer_range
            prefix = int(config.class_token)
            self.position_embeddings = PositionEmbeddings(*sizes, std, config.position_grid_size, prefix)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        shared = Blip2QFormerConfig.__dataclass_fields__.keys() & set(config.field_names())
        fields = {name: getattr(config, name) for name in shared - {"max_position_embeddings"}}  # which is for text
        fields["encoder_hidden_size"] = config.hidden_size
        self.qformer = Blip2QFormerModel._from_config(  # `AutoModel.from_config`, which is public, does not know it
            Blip2QFormerConfig(**fields), attn_implementation=config._attn_implementation
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QFormerConnector):
            init.normal_(module.query_tokens, std=self.config.initializer_range)

    def embed_tokens(
        self, inputs_embeds: torch.Tensor, tiles: tuple[int, int] = (1, 1), places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds positions to visual tokens, and normalises them: after the projection, which BLIP-2 does not have."""
        if self.position_embeddings is not None:
            inputs_embeds = self.position_embeddings(inputs_embeds, tiles, places)
        return self.LayerNorm(inputs_embeds)  # (batch, tokens, dim)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        tiles: tuple[int, int] = (1, 1),
        budget: int | None = None,
        places: torch.Tensor | None = None,
    ) -> QFormerConnectorOutput:
        """Lets the queries attend to visual tokens. Arguments and errors are those of [`TomeFormerModel.forward`].

        With a `budget` the first queries run alone (Matryoshka Query Transformer, Hu et al., 2024).
        """
        self.config.check_inputs(inputs_embeds.shape, tiles)
        if budget is not None:
            self.config.check_budget(budget, inputs_embeds.shape[1], tiles)
        tokens, layer_index = self.embed_tokens(inputs_embeds, tiles, places), None
        if self.config.num_distinctive_tokens is not None:
            num_kept = min(int(self.config.class_token) + 1 + self.config.num_distinctive_tokens, tokens.shape[1])
            choice = keep_distinctive(inputs_embeds, num_kept, self.config.class_token)  # compared without positions
            tokens, layer_index = choice.merge(tokens), (choice.output_index,)  # (batch, read tokens, dim)
        queries = self.query_tokens[:, :budget].expand(tokens.shape[0], -1, -1)  # (batch, queries, dim)
        output = self.qformer(query_embeds=queries, encoder_hidden_states=tokens)
        return QFormerConnectorOutput(last_hidden_state=output.last_hidden_state, layer_index=layer_index)


class MLPConnector(ConnectorPreTrainedModel):
    """An MLP on each visual token, as in LLaVA. With `pool_size`, on the means of a grid of them."""

    config: MLPConnectorConfig
    base_model_prefix = "mlp"

    def __init__(self, config: MLPConnectorConfig):
        super().__init__(config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense_1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense_2 = BranchLinear(config.intermediate_size, config)
        self.output_position_embeddings = build_output_positions(config)
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        tiles: tuple[int, int] = (1, 1),
        budget: int | None = None,
        places: torch.Tensor | None = None,
    ) -> BaseModelOutput:
        """Runs the MLP on each token. Arguments and errors are those of [`TomeFormerModel.forward`].

        With a `pool_size`, a `budget` is the number of means. `places` do not matter to an MLP.
        """
        self.config.check_inputs(inputs_embeds.shape, tiles)
        if budget is not None:
            self.config.check_budget(budget, inputs_embeds.shape[1], tiles)
        tokens = self.LayerNorm(self._pool(inputs_embeds, tiles, budget))
        output = self.dense_2(self.activation(self.dense_1(tokens)))  # (batch, output_tokens, dim)
        output = tokens + output if self.config.residual else output
        return BaseModelOutput(last_hidden_state=self.output_position_embeddings(output))

    def _pool(self, tokens: torch.Tensor, tiles: tuple[int, int], budget: int | None) -> torch.Tensor:
        if self.config.pool_size is None:
            return tokens
        prefix = int(self.config.class_token)
        patches = tokens[:, prefix:]
        side = math.isqrt(patches.shape[1] // math.prod(tiles))
        pooled = self.config.pool_size if budget is None else math.isqrt(budget - prefix)
        grid = patches.transpose(1, 2).unflatten(2, [count * side for count in tiles])  # (batch, dim, height, width)
        means = F.adaptive_avg_pool2d(grid, pooled).flatten(2).transpose(1, 2)  # (batch, output patches, dim)
        return torch.cat([tokens[:, :prefix], means], dim=1)


# By the `model_type` of their configurations, which may be of another copy of the code.
CONNECTORS = {model.config_class.model_type: model for model in (TomeFormerModel, QFormerConnector, MLPConnector)}


def register_connector(model_class: type[PreTrainedModel]) -> None:
    """Lets models have a connector of one's own. Its file is copied into their checkpoints.

    A connector of the same `model_type` gives way to it. Raises a ValueError that names what the class or its file
    lacks; docs/connector.md has an example.
    """
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise ValueError(f"{model_class!r} must be a class that inherits from `ConnectorPreTrainedModel`.")
    name, config_class = model_class.__name__, model_class.config_class
    # A class from a checkpoint inherits from the checkpoint's `ConnectorConfig`.
    if ConnectorConfig.__name__ not in [base.__name__ for base in getattr(config_class, "__mro__", ())]:
        raise ValueError(f"{name} must name its configuration, as in `config: {name}Config`: a `ConnectorConfig`.")
    try:
        inspect.signature(model_class.forward).bind(None, None, (1, 1), None, places=None)
        file = Path(inspect.getfile(model_class))
    except TypeError as error:
        wanted = "a file and `forward(self, inputs_embeds, tiles, budget, places)`"
        raise ValueError(f"{name} must have {wanted}: {error}.") from error
    model_type = config_class.model_type
    if not model_type or model_type in CONNECTORS:
        raise ValueError(f"{config_class.__name__} needs a `model_type` of its own, but has {model_type!r}.")
    if config_class.default_budget.__qualname__ == ConnectorConfig.default_budget.__qualname__:
        raise ValueError(f"{config_class.__name__} lacks `default_budget`, which returns the number of output tokens.")
    check_file(file)
    config_class.model_class, config_class.model_file = model_class, file
    CONNECTOR_CONFIGS[model_type] = config_class


def connector_class(config: ConnectorConfig) -> type[PreTrainedModel]:
    """The class of the connector that a configuration is for."""
    return config.model_class or CONNECTORS[config.model_type]


def load_bert_as_connector(name_or_path: str | os.PathLike, config: ConnectorConfig) -> PreTrainedModel:
    """Builds a connector that starts from a BERT checkpoint, in float32.

    A Q-Former takes BERT's self-attention, and BERT's feed-forward for the queries, as in BLIP-2 (salesforce/LAVIS,
    lavis/models/blip2_models). Its queries and its cross-attention are fresh.

    Raises a ValueError if the connector cannot start from BERT, and an OSError if there is no such checkpoint.
    """
    if not isinstance(config, TransformerConnectorConfig):
        name = type(config).__name__
        raise ValueError(f"`connector_model` is for a TomeFormer or a Q-Former, but `connector_config` is a {name}.")
    model_class = connector_class(config)
    names = getattr(model_class, "bert_names", None)
    return model_class.from_pretrained(name_or_path, config=config, dtype=torch.float32, key_mapping=names)
