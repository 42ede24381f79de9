"""Compares connectors on crowded scenes: 1 to 8 small drawings on a large canvas, at 9 to 144 tokens.

    python -m benchmarks.crowded

trains all runs below and prints their tables. A run takes some minutes on one core, the longest half an hour. Each
finished run is a line of `benchmarks/crowded/results.jsonl`. A command that was stopped continues with the next run.
Two commands side by side share the runs. `--report` prints the tables of the finished runs. It also measures the
operations and the time of a step with each number of tokens side by side, in some minutes, and draws
docs/images/crowded.png.

Most runs serve all numbers of tokens: each batch of training draws one. A small reader in place of the language model
answers questions from the tokens. The caption runs train with the language model, most of them for 25 tokens. Vision
features are cached, so the tower's time is not included.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.demo.crowded_scenes import STAMPS

from ..planned_runs import read_results, train_and_report
from ..timing import count_flops, take_turns
from . import budget_run, caption_run
from .budget_run import BudgetRun, training_step
from .budget_tables import (
    FIGURES,
    Cost,
    budget_table,
    caption_table,
    draw_curves,
    overlooked_table,
    size_table,
    step_table,
)
from .caption_run import CaptionRun
from .connector_settings import (
    ALL_TOKENS,
    CHOOSING_QFORMER,
    CHOOSING_TOMEFORMER,
    MERGING_TOMEFORMER,
    RANDOM,
    TILES,
    VIEW,
)

RESULTS = Path(__file__).parent / "results.jsonl"
CURVES = Path(__file__).parents[2] / "docs" / "images" / "crowded.png"
SEEDS = (0, 1, 2)
FINALISTS = (CHOOSING_TOMEFORMER, "means", "Q-Former")
TIMED, ROUNDS = (*FINALISTS, CHOOSING_QFORMER, VIEW, MERGING_TOMEFORMER), 5
CONTROLS = (VIEW, TILES, RANDOM)
OTHER_RATES = (3e-4, 3e-3)  # learning rates
LONG = 1800  # steps
PLAN = [
    *(BudgetRun(method, seed=seed) for seed in SEEDS for method in FINALISTS),
    *(BudgetRun(CHOOSING_QFORMER, seed=seed) for seed in SEEDS[:2]),
    *map(BudgetRun, CONTROLS),
    *(BudgetRun(method, learning_rate=rate) for method in FINALISTS for rate in OTHER_RATES),
    *(BudgetRun(method, steps=200) for method in (MERGING_TOMEFORMER, ALL_TOKENS)),  # a step takes seconds
    *(BudgetRun(CHOOSING_TOMEFORMER, seed=seed, budget=16) for seed in SEEDS),
    BudgetRun(CHOOSING_TOMEFORMER, budget=64),
    BudgetRun("Q-Former", budget=16),
    *(BudgetRun(method, seed=seed, steps=LONG) for seed in SEEDS for method in (CHOOSING_TOMEFORMER, "means")),
    *(BudgetRun(CHOOSING_TOMEFORMER, seed=seed, budget=16, steps=LONG) for seed in SEEDS),
    *(BudgetRun(method, steps=LONG) for method in ("Q-Former", CHOOSING_QFORMER)),
    *(BudgetRun(method, textured=False) for method in FINALISTS),
    *(BudgetRun(method, size=672) for method in FINALISTS),
    *(BudgetRun(method, stamps=True) for method in FINALISTS),
]
CAPTION_PLAN = [
    *(CaptionRun(method, seed=seed) for seed in SEEDS for method in (CHOOSING_QFORMER, *FINALISTS)),
    CaptionRun(MERGING_TOMEFORMER),
    CaptionRun(CHOOSING_QFORMER, tokens=None),
    *(CaptionRun(method, stamps=True) for method in (CHOOSING_QFORMER, "Q-Former")),
]


def main(argv: list[str] | None = None) -> None:
    possible = [run for run in (*PLAN, *CAPTION_PLAN) if STAMPS.is_dir() or not run.stamps]
    train_and_report(__doc__, possible, RESULTS, train, report, argv)


def train(run: BudgetRun | CaptionRun) -> dict[str, Any]:
    return caption_run.train(run) if isinstance(run, CaptionRun) else budget_run.train(run)


def report() -> None:
    """Prints the tables of each setting and of the steps, and draws the curves of the main setting."""
    results = read_results(RESULTS)
    scenes = defaultdict(list)
    for run in PLAN:
        if run.name in results:
            scenes[run.setting].append(results[run.name])
    for setting, group in scenes.items():
        print(f"\n{setting}\n\n{size_table(group)}")
        for figure in FIGURES:
            print(f"\n{figure}\n\n{budget_table(group, figure)}")
        if table := overlooked_table(group, 16):
            print(f"\nWhat the view of 224 pixels gets wrong, at 16 tokens\n\n{table}")
    if captions := [results[run.name] for run in CAPTION_PLAN if run.name in results]:
        print(f"\nCaptions of the language model\n\n{caption_table(captions)}")
    costs = measure_steps()
    print(f"\nA training step without the vision tower [GFLOP; time relative to the first]\n\n{step_table(costs)}")
    if scenes:
        draw_curves(next(iter(scenes.values())), costs, CURVES)


def measure_steps() -> dict[str, dict[int, Cost]]:
    """The cost of a forward and backward pass on one core, for each method and number of tokens, side by side."""
    torch.set_num_threads(1)
    runs = {method: BudgetRun(method) for method in TIMED}
    models = {method: training_step(run) for method, run in runs.items()}
    steps = {(method, budget): partial(models[method], budget) for method in runs for budget in runs[method].budgets}
    seconds = take_turns(steps, ROUNDS)
    costs = defaultdict(dict)
    for (method, budget), step in steps.items():
        costs[method][budget] = Cost(count_flops(step), seconds[method, budget])
    return costs


if __name__ == "__main__":
    main()
