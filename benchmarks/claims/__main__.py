"""Tests the paper's claims on the embedded data: EVLGen, BLIP-2's Q-Former in one and two stages, MLPs and controls.

    python -m benchmarks.claims

trains all runs of `plan.py` on cached features and prints their tables. A run takes from 5 minutes to an hour on one
core. Each finished run is a line of `benchmarks/claims/results.jsonl`. A command that was stopped continues with the
next run. Two commands side by side share the runs.

`--list` shows which runs are done. `--draw` prints the tables and draws the curves into docs/images/.

Seconds are the number of steps times the seconds of one step. `--time` measures the steps side by side, so that other
processes slow all methods alike. The vision tower's time is not included, as its features are cached.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from . import runs
from .plan import DATASETS, METHODS, best, plan, short_run, two_stage_sweep
from .runs import Run, append, load, load_timing
from .tables import comparison, curve_table, draw_curves, stage_one_table, table
from .training_run import time_steps, train

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="Show all runs and which of them are done.")
    parser.add_argument("--time", action="store_true", help="Time a step of each method, side by side.")
    parser.add_argument("--draw", action="store_true", help="Draw and print the finished runs.")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for run in plan():
            print("done" if load(run) else "    ", run.name)
        return
    if arguments.time:
        for dataset in DATASETS:
            chosen = [replace(best(name) or short_run(name, 1e-3), dataset=dataset) for name in METHODS]
            append({"timing": dataset, **time_steps(chosen)})
    elif not arguments.draw:
        train_all()
    report()


def train_all() -> None:
    """Trains all runs. The plan grows as they finish, here or in another process."""
    while pending := [run for run in plan() if load(run) is None]:
        if not any(train_unless_busy(run) for run in pending):
            time.sleep(30)


def train_unless_busy(run: Run) -> bool:
    """Trains a run, unless another process trains it. Returns whether the run is finished."""
    lock = FileLock(runs.RESULTS.with_name(f"{run.name}.lock"), blocking=False)
    try:
        with lock:
            if load(run) is None:
                append(train(run))
    except Timeout:
        return False
    Path(lock.lock_file).unlink(missing_ok=True)
    return True


def report() -> None:
    """Prints the tables of all finished runs and draws the main ones."""
    if stages := [result for result in map(load, two_stage_sweep()) if result]:
        print(f"\nBLIP-2's first stage, {DATASETS[0]}\n\n{stage_one_table(stages)}")
    for dataset in DATASETS:
        step_seconds = load_step_seconds(dataset)
        for group in ("sweep", "main", "ablation"):
            results = [load(run) for run in plan() if (run.dataset, run.group) == (dataset, group) and load(run)]
            if not results:
                continue
            if group == "ablation":
                results.insert(0, load(best("evlgen")))  # the unchanged run with the sweep's first seed
            print(f"\n{group}, {dataset}\n\n{table(results, step_seconds)}")
            if group == "main":
                print(f"\n{curve_table(results)}")
                draw_curves(results, step_seconds, IMAGES / f"{dataset}.png")
                for method in ("evlgen", "evlgen-paper-blocks") if step_seconds else ():
                    print(f"\n{comparison(results, step_seconds, method)}")


def load_step_seconds(dataset: str) -> dict[str, float] | None:
    """Returns the seconds of a step of each method and of the first stage, or None if they were not timed."""
    timing = load_timing(dataset)
    if timing is None:
        return None
    for method, fields in timing["fields"].items():
        chosen = best(method)
        if chosen and chosen.fields != fields:
            raise ValueError(f"{method} was timed with {fields}, but trains with {chosen.fields}. Run --time again.")
    return timing["seconds"]


if __name__ == "__main__":
    main()
