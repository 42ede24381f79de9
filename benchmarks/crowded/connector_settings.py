"""The connectors of the comparison, with the demo's settings.

They have about as many parameters, but the merging TomeFormer has half as many again.
"""

import math
from typing import Any

from ..training_step import encoder_fields

BUDGETS = (9, 16, 25, 36, 64, 144)  # tokens of the soft prompt; squares, as means lie on a square grid
VIEW = "view of 224 pixels"
TILES = "tiles of 224 pixels"
RANDOM = "random tokens"
ALL_TOKENS = "MLP on all tokens"
CHOOSING_QFORMER = "choosing Q-Former"
CHOOSING_TOMEFORMER, MERGING_TOMEFORMER = "choosing TomeFormer", "merging TomeFormer"

_SIZE = encoder_fields(hidden_size=384, layers=3) | {"class_token": False, "max_position_embeddings": 2048}
_POSITIONS = {"position_initializer_range": 0.1, "position_grid_size": None}  # about the size of the tokens
_START = {"pre_norm": True, "branch_initializer_range": 0.0, "output_position_initializer_range": 1.0}
_TOMEFORMER = {**_SIZE, **_POSITIONS, **_START, "merge_metric": "hidden_states", "num_merged_tokens": None}
_QFORMER = {**_SIZE, **_POSITIONS, "model_type": "evlgen_qformer", "cross_attention_frequency": 1}
_QFORMER |= {"intermediate_size": 768}
_MLP = {
    "model_type": "evlgen_mlp",
    "hidden_size": 384,
    "intermediate_size": 6912,
    "max_position_embeddings": 2048,
    "class_token": False,
    "residual": True,
    "branch_initializer_range": 0.0,
    "output_position_initializer_range": 1.0,
}

# The connector's configuration of each method. What depends on the image and the budgets follows.
METHODS: dict[str, dict[str, Any]] = {
    CHOOSING_TOMEFORMER: {**_TOMEFORMER, "distinctive_factor": 3},
    MERGING_TOMEFORMER: {**_TOMEFORMER, "num_hidden_layers": 5},
    "means": {**_MLP, "pool_size": None},
    "Q-Former": {**_QFORMER, "num_query_tokens": None},
    CHOOSING_QFORMER: {**_QFORMER, "num_query_tokens": None, "num_distinctive_tokens": 100},
    RANDOM: {**_TOMEFORMER, "distinctive_factor": 3},  # which keeps random tokens instead
    ALL_TOKENS: _MLP,
    VIEW: {**_TOMEFORMER, "distinctive_factor": 3},  # of the image at 224 pixels, 196 tokens
    TILES: {**_TOMEFORMER, "distinctive_factor": 3},  # of 2 x 2 tiles of 448 pixels, 196 tokens each
}


def connector_fields(method: str, grid_size: int, budget: int) -> dict[str, Any]:
    """Returns the fields of `connector_config` for images of `grid_size` x `grid_size` tokens, and up to `budget`."""
    limits = {
        "num_merged_tokens": budget,
        "num_query_tokens": budget,
        "pool_size": math.isqrt(budget),
        "position_grid_size": grid_size,
    }
    return {name: limits.get(name, value) for name, value in METHODS[method].items()}
