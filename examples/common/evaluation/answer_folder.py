"""The folder of a run that generates answers: `settings.json` and `answers.jsonl`, with one row in each line.

The settings are all that answers depend on. They keep a resumed run from mixing answers of different settings. During
a run, each process writes its answers into a part of the file, `answers.part-0.jsonl` and so on.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from common.files import only_run_in, replacing, write_whole

ANSWERS, SETTINGS = "answers.jsonl", "settings.json"


@contextmanager
def run_folder(folder: Path, state: PartialState) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it. The processes of one run share it."""
    if state.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"`output_dir`: {folder} cannot be made: {error}") from error
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
