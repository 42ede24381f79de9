"""TomeFormer: a BERT encoder over visual tokens that merges similar ones in every layer (EVLGen, section 3.2).

The positions and the ends of residual branches come first. Its peers in `connectors.py` have them, too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.bert.modeling_bert import BertIntermediate, eager_attention_forward

from configuration_evlgen.configuration_connectors import MLPConnectorConfig, TomeFormerConfig

from .token_merging import keep_all, match_down_to


def smooth_positions(grid_size: int, dim: int, length: float = 0.25) -> torch.Tensor:
    """Draws a random vector for each patch of a square grid. The closer two patches are, the more alike they are.

    Each channel is a cosine over the grid with a random direction, wavelength and phase. These are random Fourier
    features (Rahimi and Recht, NeurIPS 2007; for positions Tancik et al., NeurIPS 2020) of the kernel
    `exp(-d^2 / (2 length^2))`, where d is the distance of two patches.

    `length` is the distance, in sides of the grid, at which two patches have a correlation of `exp(-1/2)`. Returns
    `(grid_size**2, dim)`, row by row. Each channel has mean 0. All values together have standard deviation 1.
    """
    side = torch.linspace(0, 1, grid_size)
    patches = torch.cartesian_prod(side, side)  # (patches, 2)
    phases = patches @ torch.randn(2, dim) / length + 2 * torch.pi * torch.rand(dim)  # (patches, dim)
    waves = phases.cos()
    waves = waves - waves.mean(dim=0)
    return waves / waves.std()


class PositionEmbeddings(nn.Embedding):
    """Learned positions that are added to tokens.

    Fresh ones have the standard deviation `std`. Behind the `num_prefix_tokens`, those of a square grid
    of `grid_size` patches a side are smooth over it.
    """

    def __init__(
        self, num_positions: int, dim: int, std: float, grid_size: int | None = None, num_prefix_tokens: int = 0
    ):
        super().__init__(num_positions, dim)
        self.std, self.grid_size, self.num_prefix_tokens = std, grid_size, num_prefix_tokens

    def draw(self) -> torch.Tensor:
        """Returns fresh weights, `(positions, dim)`."""
        weight = torch.randn(self.num_embeddings, self.embedding_dim)
        if self.grid_size is not None:
            grid = smooth_positions(self.grid_size, self.embedding_dim)  # (patches, dim)
            weight[self.num_prefix_tokens : self.num_prefix_tokens + len(grid)] = grid
        return weight * self.std

    def forward(
        self, tokens: torch.Tensor, tiles: tuple[int, int] = (1, 1), places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds the positions to `(batch, tokens, dim)`: prefix tokens, then patches. See [`TomeFormerModel.forward`].

        A position is a place in the whole image. So the positions of more tiles, and those of merged patches, lie
        between those of one.
        """
        if places is not None:
            prefix = self.weight[: self.num_prefix_tokens].expand(len(tokens), -1, -1)
            return tokens + torch.cat([prefix, self._interpolate(places)], dim=1)
        if tiles == (1, 1):
            return tokens + self.weight[: tokens.shape[1]]  # (batch, tokens, dim)
        prefix = self.num_prefix_tokens
        side = math.isqrt((tokens.shape[1] - prefix) // math.prod(tiles))
        grid = self.weight[prefix : prefix + side**2].T.unflatten(1, (side, side))  # (dim, side, side)
        grid = F.interpolate(grid.unsqueeze(0), size=[count * side for count in tiles], mode="bilinear")
        return tokens + torch.cat([self.weight[:prefix], grid[0].flatten(1).T])

    def _interpolate(self, places: torch.Tensor) -> torch.Tensor:
        """The positions of places in the grid, `(batch, patches, dim)`: bilinear, and exact on grid points."""
        side = math.isqrt(places.shape[1])
        low = places.floor().clamp(0, max(0, side - 2)).long()  # (batch, patches, 2)
        high = (low + 1).clamp(max=side - 1)
        share = places - low
        positions = 0
        for rows, row_share in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
            for columns, column_share in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
                corner = F.embedding(self.num_prefix_tokens + rows * side + columns, self.weight)
                positions = positions + (row_share * column_share).unsqueeze(-1) * corner
        return positions.to(self.weight.dtype)


def build_output_positions(config: TomeFormerConfig | MLPConnectorConfig) -> nn.Module:
    """Returns positions for the output tokens of a connector, or the identity if it has none."""
    if config.output_position_initializer_range is None:
        return nn.Identity()
    sizes = config.max_position_embeddings, config.hidden_size
    return PositionEmbeddings(*sizes, config.output_position_initializer_range)


class BranchLinear(nn.Linear):
    """The linear map at the end of a residual branch. Its fresh weights have a standard deviation of their own."""

    def __init__(self, in_features: int, config: TomeFormerConfig | MLPConnectorConfig):
        super().__init__(in_features, config.hidden_size)
        std = config.branch_initializer_range
        self.initializer_range = config.initializer_range if std is None else std


class ConnectorPreTrainedModel(PreTrainedModel):
    """What all connectors share: they read visual tokens, and start the layers above."""

    main_input_name = "inputs_embeds"
    input_modalities = ("image",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PositionEmbeddings):
            init.copy_(module.weight, module.draw())
        elif isinstance(module, BranchLinear):
            init.normal_(module.weight, std=module.initializer_range)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError(f"A {type(self).__name__} reads `inputs_embeds`; it has no input embeddings.")


@dataclass
class TomeFormerOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, output_tokens, hidden_size)`):
            The tokens after the last layer, with their output positions if there are any.
        output_index (`torch.LongTensor` of shape `(batch, tokens)`):
            The index in `last_hidden_state` of the token that each input token became part of.
        layer_index (`tuple[torch.LongTensor]`, each of shape `(batch, tokens)`):
            The same for the tokens after each layer.
        hidden_states (`tuple[torch.Tensor]`, *optional*):
            The embedded tokens and each layer's output. Each has fewer tokens.
    """

    last_hidden_state: torch.Tensor | None = None
    output_index: torch.Tensor | None = None
    layer_index: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class TomeFormerEmbeddings(nn.Module):
    """Adds position and token-type embeddings and normalises the sum."""

    def __init__(self, config: TomeFormerConfig):
        super().__init__()
        std, sizes = config.position_initializer_range, (config.max_position_embeddings, config.hidden_size)
        std = config.initializer_range if std is None else std
        self.position_embeddings = PositionEmbeddings(*sizes, std, config.position_grid_size, int(config.class_token))
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, inputs_embeds: torch.Tensor, tiles: tuple[int, int] = (1, 1), places: torch.Tensor | None = None
    ) -> torch.Tensor:
        # Calling the module looks the row up. An offloaded module has its weights only during a call.
        first_type = torch.zeros(1, dtype=torch.long, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(first_type)  # (batch, tokens, dim)
        embeddings = self.position_embeddings(embeddings, tiles, places)
        return self.dropout(self.LayerNorm(embeddings))


class TomeFormerSelfAttention(nn.Module):
    """Attention of all tokens to all tokens. It also returns the metric by which tokens are matched."""

    def __init__(self, config: TomeFormerConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.query(hidden_states).view(heads).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        key = self.key(hidden_states).view(heads).transpose(1, 2)
        value = self.value(hidden_states).view(heads).transpose(1, 2)

        implementation = self.config._attn_implementation  # as in each model of transformers
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.dropout.p if self.training else 0.0
        context, _ = attention(self, query, key, value, attention_mask=None, dropout=dropout, scaling=self.scaling)
        context = context.reshape(hidden_states.shape)  # (batch, tokens, dim)
        # (batch, tokens, dim) or (batch, tokens, head_dim)
        metric = hidden_states if self.config.merge_metric == "hidden_states" else key.mean(dim=1)
        return context, metric.detach()  # matching is not differentiable


class TomeFormerBranchOutput(nn.Module):
    """The end of a residual branch: projection, dropout, sum and LayerNorm.

    With `pre_norm`, the layer applies this LayerNorm to the input of the branch. It keeps BERT's name here, so that
    both types of block load BERT's weights.
    """

    def __init__(self, config: TomeFormerConfig, in_features: int):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.dense = BranchLinear(in_features, config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden_states = residual + self.dropout(self.dense(hidden_states))  # (batch, tokens, dim)
        return hidden_states if self.pre_norm else self.LayerNorm(hidden_states)


class TomeFormerAttention(nn.Module):
    def __init__(self, config: TomeFormerConfig):
        super().__init__()
        self.self = TomeFormerSelfAttention(config)
        self.output = TomeFormerBranchOutput(config, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.output.LayerNorm(hidden_states) if self.output.pre_norm else hidden_states
        context, metric = self.self(normed)
        return self.output(context, hidden_states), metric


class TomeFormerLayer(GradientCheckpointingLayer):
    """One BERT layer with a merge between its two residual branches."""

    def __init__(self, config: TomeFormerConfig):
        super().__init__()
        self.class_token = config.class_token
        self.attention = TomeFormerAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = TomeFormerBranchOutput(config, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the layer and merges tokens until `num_tokens` are left. Also returns the index of each input token."""
        hidden_states, metric = self.attention(hidden_states)
        merging = match_down_to(metric, num_tokens, self.class_token)
        hidden_states = merging.merge(hidden_states)  # (batch, num_tokens, dim)
        normed = self.output.LayerNorm(hidden_states) if self.output.pre_norm else hidden_states
        return self.output(self.intermediate(normed), hidden_states), merging.output_index


class TomeFormerEncoder(nn.Module):
    def __init__(self, config: TomeFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList(TomeFormerLayer(config) for _ in range(config.num_hidden_layers))


class TomeFormerModel(ConnectorPreTrainedModel):
    """The connector of EVLGen. It takes `(batch, tokens, hidden_size)` and returns fewer tokens of the same width.

    The names of its weights are BERT's, as in the original implementation (yiren-jian/EVLGen, `VLconnector.*`). So
    `TomeFormerModel.from_pretrained("bert-base-uncased", merge_r=19)` starts from BERT's encoder. Its word embeddings
    and its pooler are left out.
    """

    config: TomeFormerConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["TomeFormerLayer"]
    _keys_to_ignore_on_load_unexpected = [r"word_embeddings", r"pooler\.", r"cls\.", r"position_ids"]

    def __init__(self, config: TomeFormerConfig):
        super().__init__(config)
        self.embeddings = TomeFormerEmbeddings(config)
        self.encoder = TomeFormerEncoder(config)
        self.output_position_embeddings = build_output_positions(config)
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        tiles: tuple[int, int] = (1, 1),
        budget: int | None = None,
        output_hidden_states: bool = False,
        places: torch.Tensor | None = None,
    ) -> TomeFormerOutput:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch, tokens, hidden_size)`):
                Tokens to merge, the class token first if there is one.
            tiles (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): Rows and columns of tiles of each image.
            budget (`int`, *optional*): Number of tokens to merge to. By default the configuration's.
            output_hidden_states (`bool`, *optional*, defaults to `False`):
                Whether to return all hidden states.
            places (`torch.FloatTensor` of shape `(batch, patches, 2)`, *optional*):
                Row and column of each patch, if patches are not in the order of their grid.

        Raises:
            ValueError: If `inputs_embeds` has a wrong shape or more tokens in a tile than `max_position_embeddings`,
                or `budget` is out of range.
        """
        self.config.check_inputs(inputs_embeds.shape, tiles)
        counts = self.config.token_counts(inputs_embeds.shape[1], budget)
        hidden_states = self.embeddings(inputs_embeds, tiles, places)
        all_hidden_states, all_index = (hidden_states,), ()
        output_index = keep_all(hidden_states).output_index
        for layer, num_tokens in zip(self.encoder.layer, counts[1:], strict=True):
            hidden_states, layer_index = layer(hidden_states, num_tokens)
            output_index = layer_index.gather(1, output_index)  # composes the layers' indices
            all_hidden_states, all_index = (*all_hidden_states, hidden_states), (*all_index, output_index)
        return TomeFormerOutput(
            last_hidden_state=self.output_position_embeddings(hidden_states),
            output_index=output_index,
            layer_index=all_index,
            hidden_states=all_hidden_states if output_hidden_states else None,
        )
