"""The connectors of the comparison, with the demo's settings. They have about as many parameters."""

import math
from typing import Any

from ..training_step import encoder_fields

BUDGETS = (9, 16, 25, 36, 64, 144)  # tokens of the soft prompt; squares, as means lie on a square grid
VIEW = "view of 224 pixels"
RANDOM = "random tokens"
ALL_TOKENS = "MLP on all tokens"

_SIZE = encoder_fields(hidden_size=384, layers=3) | {"class_token": False, "max_position_embeddings": 2048}
_POSITIONS = {"position_initializer_range": 0.1}  # about the size of the tokens
_START = {"pre_norm": True, "branch_initializer_range": 0.0, "output_position_initializer_range": 1.0}
_TOMEFORMER = {**_SIZE, **_POSITIONS, **_START, "merge_metric": "hidden_states"}
_MLP = {
    "hidden_size": 384,
    "intermediate_size": 6912,
    "max_position_embeddings": 2048,
    "class_token": False,
    "residual": True,
    "branch_initializer_range": 0.0,
    "output_position_initializer_range": 1.0,
}

# The arguments `--connector` and `--connector_config` of each method; `position_grid_size` follows from the image.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "choose": ("tomeformer", {**_TOMEFORMER, "distinctive_factor": 3}),
    "merge": ("tomeformer", {**_TOMEFORMER, "num_hidden_layers": 5}),
    "means": ("mlp", _MLP),
    "Q-Former": ("qformer", {**_SIZE, **_POSITIONS, "cross_attention_frequency": 1, "intermediate_size": 768}),
    RANDOM: ("tomeformer", {**_TOMEFORMER, "distinctive_factor": 3}),  # which keeps random tokens instead
    ALL_TOKENS: ("mlp", _MLP),
    VIEW: ("tomeformer", {**_TOMEFORMER, "distinctive_factor": 3}),  # of the image at 224 pixels, 196 tokens
}


def connector_fields(method: str, grid_size: int) -> tuple[str, dict[str, Any]]:
    """Returns `--connector` and `--connector_config` for images of `grid_size` x `grid_size` tokens."""
    connector, fields = METHODS[method]
    if connector == "tomeformer":
        fields = fields | {"num_merged_tokens": max(BUDGETS)}
    if connector == "qformer":
        fields = fields | {"num_query_tokens": max(BUDGETS)}
    if connector == "mlp" and method != ALL_TOKENS:
        fields = fields | {"pool_size": math.isqrt(max(BUDGETS))}
    if "position_initializer_range" in fields:
        fields = fields | {"position_grid_size": grid_size}
    return connector, fields
