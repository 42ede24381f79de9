"""Results of training runs: a line of `results.jsonl` for each, with the commit that made it. Tables of results."""

import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

Run = Any  # a frozen dataclass with a property `name`
Result = dict[str, Any]


def train_missing(runs: Iterable[Run], path: Path, train: Callable[[Run], Result]) -> None:
    """Trains each run whose name is not in the file of results, and appends its line."""
    for run in runs:
        if run.name not in read_results(path):
            line = {"name": run.name, "commit": current_commit(), "run": asdict(run), **train(run)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_results(path: Path) -> dict[str, Result]:
    """The lines of a file of results by their names."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def current_commit() -> str | None:
    """The commit of this repository, with `-dirty` if files were changed since. None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def band(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, with the lowest and the highest in brackets if they differ."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} [{low}, {high}]"


def spread(shares: Sequence[float], digits: int = 0) -> str:
    """The same for shares, in %."""
    return band([100 * share for share in shares], digits)


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    lines.insert(1, f"{'|---' * len(header)}|")
    return "\n".join(lines)
