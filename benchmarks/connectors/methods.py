"""The connectors and data sets of the comparison. Each method makes 25 tokens of an image, but one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pretrain

from ..models import CROWDED_RECIPE, START, encoder_fields


@dataclass(frozen=True)
class Data:
    """A data set with the recipe that trains on it, and the length of its runs."""

    recipe: Path
    grid: int  # vision tokens along each side of an image
    eval_steps: tuple[int, ...]  # held-out losses are measured after these steps, the last of the training
    caption_steps: tuple[int, ...]  # captions are generated after these, which the tables show
    max_new_tokens: int
    test_images: int | None = None  # None: all
    arguments: dict[str, Any] = field(default_factory=dict)  # others of the training
    separate: bool = False  # a row for each text of an image, drawn in random order


_QUESTIONS = {"dataset": "crowded-questions", "prompt_column": "question", "caption_column": "answer"}
_ROWS = {**_QUESTIONS, "per_device_train_batch_size": 61}  # as many texts as 16 images have, 3.8 each

DATASETS = {
    "openmoji-scenes": Data(pretrain.DEMO_RECIPE, 14, (25, 50, 100, 150, 200), (100, 200), 20),
    "easy-vqa": Data(pretrain.DEMO_RECIPE, 14, (25, 50, 100, 150, 200), (100, 200), 20, 200),
    "crowded-scenes": Data(CROWDED_RECIPE, 28, (400,), (400,), 60),
    # A caption and up to three questions of each image: 16 images with all their texts in a step, or 64 rows.
    "crowded-questions": Data(CROWDED_RECIPE, 28, (200,), (200,), 60, arguments=_QUESTIONS),
    # As many seconds as the rows: in 120 of them, rows made 19 steps and shared rows 38.
    "crowded-questions-equal-time": Data(CROWDED_RECIPE, 28, (410,), (410,), 60, arguments=_QUESTIONS),
    "crowded-questions-longer": Data(CROWDED_RECIPE, 28, (500,), (500,), 60, arguments=_QUESTIONS),
    "crowded-questions-rows": Data(CROWDED_RECIPE, 28, (200,), (200,), 60, arguments=_ROWS, separate=True),
}
METHODS = ("evlgen", "qformer", "qformer-chooses-first", "qformer-two-stage", "mean-pooling", "mlp-all-tokens")
# These rates were the best of three or more in short runs on scenes. The lines of results.jsonl have all of them.
LEARNING_RATE = 1e-3
STAGE_ONE_STEPS, STAGE_ONE_BATCH, STAGE_ONE_WARMUP, STAGE_ONE_RATE = 200, 64, 50, 3e-4


def connector_of(method: str, grid: int) -> tuple[str, dict[str, Any]]:
    """The values of `--connector` and `--connector_config` for images of `grid` x `grid` vision tokens."""
    crowded = grid > 14
    encoder = encoder_fields(hidden_size=384, layers=3)
    encoder |= {"position_initializer_range": 0.1, "position_grid_size": grid}
    mlp = {"hidden_size": 384, "intermediate_size": 6912, "residual": True}
    mlp |= {name: START[name] for name in ("branch_initializer_range", "output_position_initializer_range")}
    # Cross-attention is in every second layer, as in BLIP-2, or in every one. The feed-forwards differ, so that the
    # numbers of parameters do not.
    everywhere = {"cross_attention_frequency": 1, "intermediate_size": 768}
    qformer = {**encoder, "num_query_tokens": 25, **(everywhere if crowded else {"intermediate_size": 1024})}
    merge_r = [392, 196, 98, 49, 24] if crowded else [98, 49, 24]  # each layer merges as many tokens as it can
    merging = {**encoder, **START, "merge_metric": "hidden_states", "merge_r": merge_r}
    connector, fields = {
        "evlgen": ("tomeformer", {**merging, "num_hidden_layers": len(merge_r)}),
        "qformer": ("qformer", qformer),
        "qformer-chooses-first": ("qformer", {**qformer, **everywhere, "num_distinctive_tokens": 100}),
        "qformer-two-stage": ("qformer", qformer),
        "mean-pooling": ("mlp", {**mlp, "pool_size": 5}),
        "mlp-all-tokens": ("mlp", mlp),
    }[method]
    return connector, {**fields, "max_position_embeddings": 2048 if crowded else 512}
