"""What an evaluation leaves behind: `predictions.json`, as the official tools read it, and `results.json`.

`results.json` has the form of an entry of a model card's `model-index`, with a few keys more; so an entry's `task`,
`dataset` and `metrics` are what `huggingface_hub.EvalResult` wants.
"""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset

from common.evaluation.benchmark_files import CAPTION_BENCHMARKS
from common.evaluation.evaluation_arguments import EvaluationArguments
from common.files import write_whole

METRICS_FOLDER = Path(__file__).parents[2] / "metrics"
DATASET_NAMES = {
    "coco-karpathy": "COCO Captions, Karpathy's splits",
    "nocaps": "NoCaps",
    "flickr30k": "Flickr30k, Karpathy's splits",
    "msr-vtt": "MSR-VTT",
    "msvd": "MSVD",
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "ok-vqa": "OK-VQA",
}
# What the scripts have further arguments for, by what it belongs to.
BENCHMARK_FILES = ("annotations", "media_dir", "questions", "split_file")
DATASET_ARGUMENTS = ("image_column", "video_column", "caption_column", "prompt_column", "rule")
LIBRARIES = ("accelerate", "datasets", "evaluate", "pycocoevalcap", "spacy", "torch", "transformers")


def check_source(
    evaluation: EvaluationArguments, own: Any, benchmarks: dict[str, tuple[str, ...]], default: str
) -> str:
    """What is to be evaluated on: the benchmark or data set that is given, or the demo's.

    Args:
        evaluation: The arguments of both scripts.
        own: Those of this script.
        benchmarks: The script's benchmarks, and which arguments each one reads.
        default: The demo's data set.

    Raises:
        ValueError: If the benchmark is unknown, both are given, or an argument that would not be read.
    """
    given = [name for part in (evaluation, own) for name in _given(part)]
    if evaluation.max_samples is not None and evaluation.max_samples < 1:
        raise ValueError(f"`max_samples` must be at least 1, but is {evaluation.max_samples}.")
    if evaluation.benchmark is None:
        for name in given:
            if name in BENCHMARK_FILES:
                raise ValueError(f"`{name}` belongs to a benchmark: say which with --benchmark.")
            if name in ("data_files", "dataset_config", *DATASET_ARGUMENTS) and not evaluation.dataset:
                raise ValueError(f"`{name}` belongs to a data set: say which with --dataset.")
    elif evaluation.dataset:
        raise ValueError("`benchmark` and `dataset` cannot both be given.")
    elif evaluation.benchmark not in benchmarks:
        raise ValueError(f"`benchmark` must be one of {', '.join(benchmarks)}, but is {evaluation.benchmark!r}.")
    else:
        read = ("media_dir", *benchmarks[evaluation.benchmark])
        for name in given:
            if name in (*BENCHMARK_FILES, "test_split") and name not in read:
                raise ValueError(f"`{name}` is not read for {evaluation.benchmark}, but only {', '.join(read)}.")
            if name in ("data_files", "dataset_config", *DATASET_ARGUMENTS):
                raise ValueError(f"`{name}` belongs to `dataset`, and cannot be set for a benchmark.")
    return evaluation.benchmark or evaluation.dataset or default


def _given(arguments: Any) -> list[str]:
    """Names of the arguments that are not their defaults."""
    unset = type(arguments)()
    return [name for name, value in vars(arguments).items() if value != getattr(unset, name)]


def source_settings(name: str, evaluation: EvaluationArguments) -> dict[str, Any]:
    """Where rows are from, as the user named it. Scores can be had with other annotations, so those are left out."""
    return {
        "benchmark": evaluation.benchmark,
        "dataset": None if evaluation.benchmark else name,
        "dataset_config": evaluation.dataset_config,
        "data_files": evaluation.data_files,
        "test_split": evaluation.test_split,
        "media_dir": evaluation.media_dir,
        "max_samples": evaluation.max_samples,
    }


def take(rows: Dataset, limit: int | None) -> Dataset:
    """The first rows, at most `limit`."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def subset_note(num_rows: int, total: int) -> list[str]:
    """What is to be said of scores of some of a split's rows, if anything."""
    if num_rows == total:
        return []
    return [f"Only {num_rows} of {total} rows were answered: the scores cannot be compared with those of all."]


def output_folder(evaluation: EvaluationArguments, name: str) -> Path:
    """Where a run's answers and results go: `output_dir`, or a folder named after the model and the data."""
    if evaluation.output_dir:
        return Path(evaluation.output_dir)
    return Path("outputs", "evaluation", Path(evaluation.model).name, Path(name).name)


def write_results(
    folder: Path,
    task: tuple[str, str],
    name: str,
    metrics: list[dict[str, Any]],
    evaluation: EvaluationArguments,
    num_rows: int,
    notes: list[str],
    **details: Any,
) -> dict[str, Any]:
    """Writes `results.json` and prints the figures.

    Args:
        folder: Where the run's answers and `settings.json` are.
        task: The Hub's name of the task, and a readable one.
        name: The benchmark, or the folder or name of a data set.
        metrics: `{"type": the metric's key, "name": readable, "value": number}`, with `"args"` if it is of a part of
            the rows.
        evaluation: The script's arguments.
        num_rows: How many rows were answered.
        notes: Why figures cannot be compared with others.
        details: More to keep.

    Returns:
        What was written.
    """
    dataset = {"type": name, "name": DATASET_NAMES.get(name, Path(name).name)}
    if evaluation.benchmark is None or "test_split" in CAPTION_BENCHMARKS.get(name, ()):
        dataset["split"] = evaluation.test_split
    if evaluation.dataset_config:
        dataset["config"] = evaluation.dataset_config
    if evaluation.annotations:
        dataset["args"] = {"annotations": Path(evaluation.annotations).name}
    results = {
        "task": {"type": task[0], "name": task[1]},
        "dataset": dataset,
        "metrics": metrics,
        **details,
        "model": evaluation.model,
        "num_rows": num_rows,
        "notes": notes,
        "settings": json.loads((folder / "settings.json").read_text(encoding="utf-8")),
        "versions": {library: version(library) for library in LIBRARIES if find_spec(library)},
    }
    write_json(folder / "results.json", results)
    for metric in metrics:
        print(f"{metric['name']}: {metric['value']:.4f}")
    for note in notes:
        print(f"Note: {note}")
    print(f"{folder}/ holds answers.jsonl, predictions.json and results.json.")
    return results


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as a whole."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
