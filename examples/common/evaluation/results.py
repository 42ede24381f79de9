"""The results of an evaluation: `predictions.json` for the official tools, and `results.json`.

`results.json` has the form of an entry of a model card's `model-index`, and some more keys. Its `task`, `dataset` and
`metrics` are the arguments of `huggingface_hub.EvalResult`.
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
# The scripts' arguments that belong to a benchmark, and those that belong to a data set.
BENCHMARK_FILES = ("annotations", "media_dir", "questions", "split_file")
DATASET_ARGUMENTS = ("image_column", "video_column", "caption_column", "prompt_column", "rule")
LIBRARIES = ("accelerate", "datasets", "evaluate", "pycocoevalcap", "spacy", "torch", "transformers")


def check_source(
    evaluation_args: EvaluationArguments, script_args: Any, benchmarks: dict[str, tuple[str, ...]], default: str
) -> str:
    """Chooses the benchmark or data set: the one that is given, or the demo's.

    Args:
        evaluation_args: The arguments that both scripts have.
        script_args: Those that only this script has.
        benchmarks: The script's benchmarks, and the arguments that each of them reads.
        default: The demo's data set.

    Returns:
        Its name.

    Raises:
        ValueError: If the benchmark is unknown, both are given, or an argument is given that would not be read.
    """
    given = [name for arguments in (evaluation_args, script_args) for name in _non_defaults(arguments)]
    benchmark, dataset = evaluation_args.benchmark, evaluation_args.dataset
    if benchmark is None:
        for name in given:
            if name in BENCHMARK_FILES:
                raise ValueError(f"`{name}` belongs to a benchmark: name it with --benchmark.")
            if name in ("data_files", "dataset_config", *DATASET_ARGUMENTS) and not dataset:
                raise ValueError(f"`{name}` belongs to a data set: name it with --dataset.")
    elif dataset:
        raise ValueError("`benchmark` and `dataset` cannot both be given.")
    elif benchmark not in benchmarks:
        raise ValueError(f"`benchmark` must be one of {', '.join(benchmarks)}, but is {benchmark!r}.")
    else:
        read = ("media_dir", *benchmarks[benchmark])
        for name in given:
            if name in (*BENCHMARK_FILES, "test_split") and name not in read:
                raise ValueError(f"`{name}` is not read for {benchmark}, but only {', '.join(read)}.")
            if name in ("data_files", "dataset_config", *DATASET_ARGUMENTS):
                raise ValueError(f"`{name}` belongs to `dataset`, and cannot be set for a benchmark.")
    return benchmark or dataset or default


def _non_defaults(arguments: Any) -> list[str]:
    """Names of the arguments with other values than their defaults."""
    defaults = type(arguments)()  # the parser does not record which arguments were given
    return [name for name, value in vars(arguments).items() if value != getattr(defaults, name)]


def source_settings(name: str, evaluation_args: EvaluationArguments) -> dict[str, Any]:
    """The origin of the rows, in the user's terms. Answers do not depend on the annotations, which are left out."""
    return {
        "benchmark": evaluation_args.benchmark,
        "dataset": None if evaluation_args.benchmark else name,
        "dataset_config": evaluation_args.dataset_config,
        "data_files": evaluation_args.data_files,
        "test_split": evaluation_args.test_split,
        "media_dir": evaluation_args.media_dir,
        "max_samples": evaluation_args.max_samples,
    }


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """The first rows, at most `limit`; all of them for None."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def subset_note(num_rows: int, total: int) -> list[str]:
    """A note for scores of a part of a split; none for the whole split."""
    if num_rows == total:
        return []
    return [f"Only {num_rows} of {total} rows were answered: the scores cannot be compared with those of all."]


def output_folder(evaluation_args: EvaluationArguments, name: str) -> Path:
    """The folder of answers and results: `output_dir`, or one named after the model and the data."""
    if evaluation_args.output_dir:
        return Path(evaluation_args.output_dir)
    return Path("outputs", "evaluation", Path(evaluation_args.model).name, Path(name).name)


def write_results(
    folder: Path,
    task: tuple[str, str],
    name: str,
    metrics: list[dict[str, Any]],
    evaluation_args: EvaluationArguments,
    num_rows: int,
    notes: list[str],
    **details: Any,
) -> dict[str, Any]:
    """Writes `results.json` and prints the figures.

    Args:
        folder: Holds the answers and `settings.json`.
        task: The Hub's name of the task, and a readable name.
        name: The benchmark, or the folder or name of a data set.
        metrics: `{"type": the metric's key, "name": a readable name, "value": number}`. A metric of a part of the rows
            also has `"args"`.
        evaluation_args: The arguments that both scripts have.
        num_rows: The number of rows that were answered.
        notes: Reasons why figures cannot be compared with others.
        details: Further entries of `results.json`.

    Returns:
        The content of `results.json`.
    """
    dataset = {"type": name, "name": DATASET_NAMES.get(name, Path(name).name)}
    if evaluation_args.benchmark is None or "test_split" in CAPTION_BENCHMARKS.get(name, ()):
        dataset["split"] = evaluation_args.test_split
    if evaluation_args.dataset_config:
        dataset["config"] = evaluation_args.dataset_config
    if evaluation_args.annotations:
        dataset["args"] = {"annotations": Path(evaluation_args.annotations).name}
    results = {
        "task": {"type": task[0], "name": task[1]},
        "dataset": dataset,
        "metrics": metrics,
        **details,
        "model": evaluation_args.model,
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
    """Writes a JSON file that is whole even if the process is killed."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
