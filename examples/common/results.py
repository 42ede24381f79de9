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

from common.arguments import EvaluationArguments
from common.files import write_whole

METRICS_FOLDER = Path(__file__).parents[1] / "metrics"
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
BENCHMARKS_WITH_SPLITS = ("coco-karpathy", "flickr30k", "msr-vtt")  # in one file
LIBRARIES = ("accelerate", "datasets", "evaluate", "pycocoevalcap", "spacy", "torch", "transformers")


def check_source(
    evaluation: EvaluationArguments, benchmarks: tuple[str, ...], default: str, **files: str | None
) -> str:
    """What is to be evaluated on: the benchmark or data set that is given, or the demo's.

    Args:
        evaluation: The script's arguments.
        benchmarks: The script's benchmarks.
        default: The demo's data set.
        files: The benchmarks' files that only this script has arguments for.

    Raises:
        ValueError: If the benchmark is unknown, both are given, or files of a benchmark without one.
    """
    if evaluation.benchmark is None:
        files |= {"annotations": evaluation.annotations, "media_dir": evaluation.media_dir}
        for argument, path in files.items():
            if path:
                raise ValueError(f"`{argument}` belongs to a benchmark: say which with --benchmark.")
        return evaluation.dataset or default
    if evaluation.dataset:
        raise ValueError("`benchmark` and `dataset` cannot both be given.")
    if evaluation.benchmark not in benchmarks:
        raise ValueError(f"`benchmark` must be one of {', '.join(benchmarks)}, but is {evaluation.benchmark!r}.")
    return evaluation.benchmark


def take(rows: Dataset, limit: int | None) -> Dataset:
    """The first rows, at most `limit`."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


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
        details: More to keep.

    Returns:
        What was written.
    """
    dataset = {"type": name, "name": DATASET_NAMES.get(name, Path(name).name)}
    if evaluation.benchmark is None or name in BENCHMARKS_WITH_SPLITS:
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
        "settings": json.loads((folder / "settings.json").read_text(encoding="utf-8")),
        "versions": {library: version(library) for library in LIBRARIES if find_spec(library)},
    }
    write_json(folder / "results.json", results)
    for metric in metrics:
        print(f"{metric['name']}: {metric['value']:.4f}")
    print(f"{folder}/ holds answers.jsonl, predictions.json and results.json.")
    return results


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as a whole."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
