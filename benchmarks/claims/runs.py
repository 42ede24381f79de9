"""The settings of one run, and `results.jsonl` with the results of the finished runs.

Each line of the file is a JSON object: a finished run with its settings, or the timings of a data set. Lines are only
appended. Of two lines for the same run or data set, the last one counts.
"""

import json
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pretrain
import yaml
from filelock import FileLock

RESULTS = Path(__file__).parent / "results.jsonl"
# The fields of the demo's recipe that a result depends on. All runs share them.
_RECIPE_FIELDS = (
    "chat_template",
    "whitening_images",
    "per_device_train_batch_size",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "bf16",
)


@dataclass(frozen=True)
class Run:
    """The settings of one training run. All other settings are those of the demo's recipe."""

    method: str  # the connector with its options
    dataset: str
    connector: str  # value of `--connector`
    fields: dict[str, Any]  # all fields of the connector's configuration
    learning_rate: float
    steps: int
    seed: int
    eval_steps: list[int]  # after these, held-out figures are measured; the last step is among them
    group: str = "main"  # or "sweep" or "ablation"
    train_samples: int | None = None  # None: all
    # BLIP-2's first stage before the training, if it has steps. Its batches are larger, as the contrastive loss needs
    # many negatives and no language model takes part.
    stage_one_steps: int = 0
    stage_one_learning_rate: float = 1e-3
    stage_one_batch_size: int = 64
    stage_one_warmup_steps: int = 50
    warmup_steps: int | None = None  # None: the recipe's value
    connector_model: str | None = None  # the BERT that the connector starts from
    whitening: bool = True  # the vision projection starts from the statistics of the tower's features
    random_pruning: bool = False  # the TomeFormer drops random tokens where it would merge tokens
    prompt_scale: float = 1.0  # of the initial language projection, and so of the soft prompt

    @property
    def name(self) -> str:
        stage_one = f".after{self.stage_one_learning_rate:g}" if self.stage_one_steps else ""
        return f"{self.group}.{self.dataset}.{self.method}{stage_one}.lr{self.learning_rate:g}.seed{self.seed}"


def shared_recipe() -> dict[str, Any]:
    """The settings of the demo's recipe that all runs share."""
    return _read_recipe(pretrain.DEMO_RECIPE)


@cache
def _read_recipe(path: Path) -> dict[str, Any]:
    recipe = yaml.safe_load(path.read_text())
    return {name: recipe.get(name) for name in _RECIPE_FIELDS}


def load(run: Run) -> dict[str, Any] | None:
    """Returns the result of a run, or None if the run is not finished.

    Raises:
        ValueError: If the file holds this run with other settings or another recipe.
    """
    result = _read_results().get(run.name)
    if result is not None and (Run(**result["run"]), result["recipe"]) != (run, shared_recipe()):
        raise ValueError(f"{RESULTS} has other settings for {run}. Remove its line to train it again.")
    return result


def load_timing(dataset: str) -> dict[str, Any] | None:
    """Returns the timings on a data set, or None if there are none."""
    return _read_results().get(f"timing.{dataset}")


def append(entry: dict[str, Any]) -> None:
    """Appends a finished run or a timing to the file. A process that is killed meanwhile damages no other line."""
    with FileLock(f"{RESULTS}.lock"), RESULTS.open("a+b") as file:
        file.seek(0)
        # A killed process may have left a part of a line.
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_results() -> dict[str, dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    stat = RESULTS.stat()
    return _parse(RESULTS, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _parse(path: Path, size: int, modified: int) -> dict[str, dict[str, Any]]:
    """Finished runs by name, and timings by `timing.` and data set. `size` and `modified` are keys of the cache."""
    *lines, _ = path.read_text().split("\n")  # what follows the last line break is empty, or a line that was cut off
    entries = map(json.loads, lines)
    return {f"timing.{e['timing']}" if "timing" in e else Run(**e["run"]).name: e for e in entries}
