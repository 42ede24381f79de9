"""Trains a list of runs, and keeps each result as a line of a file. Several processes may share the list."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from filelock import FileLock, Timeout

Run = Any  # a frozen dataclass with a property `name`
Result = dict[str, Any]


def train_and_report(
    description: str,
    plan: Sequence[Run],
    results: Path,
    train: Callable[[Run], Result],
    report: Callable[[], None],
    argv: list[str] | None,
) -> None:
    """The command of a comparison: trains all planned runs, and prints a report. `--report` does the latter alone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Print the tables of the finished runs.")
    if not parser.parse_args(argv).report:
        train_planned(plan, results, train)
    report()


def train_planned(plan: Sequence[Run], results: Path, train: Callable[[Run], Result]) -> None:
    """Trains all runs that are not finished. Other processes may train some of them.

    Args:
        plan (`Sequence`): The settings of each run.
        results (`Path`): The file of results.
        train (`Callable`): Trains a run and returns its figures.
    """
    torch.set_num_threads(1)  # so that two processes on two cores do not slow each other
    while pending := [run for run in plan if run.name not in read_results(results)]:
        if not any(_train_unless_busy(run, results, train) for run in pending):
            time.sleep(30)


def _train_unless_busy(run: Run, results: Path, train: Callable[[Run], Result]) -> bool:
    """Trains a run, unless another process trains it. Returns whether the run is finished."""
    lock = FileLock(results.with_name(f"{run.name}.lock"), blocking=False)
    try:
        with lock:
            if run.name not in read_results(results):
                line = json.dumps({"name": run.name, "run": asdict(run), **train(run)})
                with FileLock(f"{results}.lock"), results.open("a") as file:
                    file.write(line + "\n")
    except Timeout:
        return False
    Path(lock.lock_file).unlink(missing_ok=True)
    return True


def read_results(results: Path) -> dict[str, Result]:
    """The results of the finished runs by name."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def spread(shares: Sequence[float]) -> str:
    """The mean share over seeds in %, with the lowest and the highest in brackets."""
    return band([100 * share for share in shares], digits=0)


def band(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, with the lowest and the highest in brackets."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), mean(values), max(values)))
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"
