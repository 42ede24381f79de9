"""What a model says about every row of a benchmark: shared out among processes, and kept as it comes.

The folder of a run holds `settings.json`, what its answers depend on, and `answers.jsonl`, one row in each line; while
it runs, each process writes a part of that file. Batches are the same whoever computes them, so that neither the
number of processes nor an interruption changes an answer.
"""

import hashlib
import json
import os
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature

from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.loading import open_media
from common.evaluation.captions import generate_batches
from common.evaluation.evaluation_arguments import AnswerArguments, EvaluationArguments, GenerationArguments
from common.files import replacing, write_whole
from common.models import load_captioner
from common.processes import use_all_cores
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import hash_weights
from processing_evlgen import EVLGenProcessor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PromptCollator(CaptionCollator):
    """Prompts of rows that need no captions, but an `id`, which an unreadable image is reported with."""

    def read(self, row: dict[str, Any]) -> Image.Image | list[Image.Image]:
        try:
            return open_media(row, self.arguments)
        except ValueError as error:
            raise ValueError(f"row {row['id']}: {error}") from error


def start_processes() -> PartialState:
    """Finds the other processes of `accelerate launch`, if any, and the device of this one."""
    # A process that is done waits for the others, which may take long.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    use_all_cores(state.device)
    return state


def answer_rows(
    rows: Dataset,
    columns: DataArguments,
    generation: GenerationArguments,
    evaluation: EvaluationArguments,
    source: dict[str, Any],
    folder: Path,
    state: PartialState,
) -> list[str] | None:
    """Loads the model and asks it about each row that `folder` has no answer to yet.

    Args:
        rows: With a column `id`, and those that `columns` names.
        columns: Columns of images, videos and questions; the prompt.
        generation: How to decode.
        evaluation: Which model, in what precision, how many rows at a time.
        source: Where the rows are from, by names that a user knows; kept beside the answers.
        folder: Where the answers are kept.
        state: From [`start_processes`].

    Returns:
        On the main process, all answers in the order of the rows; None on others.

    Raises:
        ValueError: If the model cannot be loaded, ids are not unique, an image is missing or cannot be read, or the
            answers in `folder` come from other settings, rows or images, or another model.
    """
    if not len(rows):
        raise ValueError("There is nothing to evaluate: the split has no rows, or `max_samples` is 0.")
    ids = _unique_ids(rows)
    known = row_settings(rows, ids, columns) if state.is_main_process else {}
    model, processor = load_answering_model(evaluation)
    if state.is_main_process:
        settings = {
            **source,
            **known,
            "prompt": columns.prompt,
            "num_frames": columns.num_frames if columns.video_column else None,
            **answering_settings(model, processor, generation, evaluation),
        }
        check_settings(folder, settings)
    collate = PromptCollator(processor, columns, training=False).prompts
    answer_pending(rows, ids, collate, model, processor, generation, evaluation, folder, state)
    return list(read_answers(folder / "answers.jsonl").values()) if state.is_main_process else None


def row_settings(rows: Dataset, ids: list[int | str], columns: DataArguments) -> dict[str, str]:
    """Checksums by which rows are known again: of their ids and questions, and of their images or videos.

    An image that lies in a file is known by the file's name and size, one that is in the data set by its bytes.

    Raises:
        ValueError: If a row has no image, or its file is missing.
    """
    questions = rows[columns.prompt_column][:] if columns.prompt_column else None
    digest = hashlib.sha256()
    column = columns.video_column or columns.image_column
    for row, value in zip(ids, rows.select_columns(column), strict=True):
        try:
            digest.update(repr(_identity(value[column])).encode())
        except (OSError, TypeError) as error:
            raise ValueError(f"row {row}: `{column}` is missing: {error}") from error
    return {"rows": _checksum([ids, questions]), "images": digest.hexdigest()[:16]}


def _identity(medium: Any) -> Any:
    if isinstance(medium, list):  # a video's frames
        return [_identity(one) for one in medium]
    if isinstance(medium, dict):  # of an image or video in a data set
        medium = medium["path"] if medium.get("bytes") is None else medium["bytes"]
    if medium is None:
        raise TypeError("there is none")
    if isinstance(medium, bytes):
        return zlib.crc32(medium)
    is_path = isinstance(medium, str) and not medium.startswith(("http://", "https://", "data:"))
    return (Path(medium).name, os.path.getsize(medium)) if is_path else medium


def load_answering_model(arguments: AnswerArguments) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    """Loads a model in the precision that it is to answer in, and its processor.

    Raises:
        ValueError: If there is no such model or precision, or batches are to be empty.
    """
    if arguments.batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but is {arguments.batch_size}.")
    if arguments.dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {arguments.dtype!r}.")
    load = partial(EVLGenForConditionalGeneration.from_pretrained, dtype=DTYPES[arguments.dtype])
    model = load_captioner("model", load, arguments.model)
    return model, EVLGenProcessor.from_pretrained(arguments.model)


def answering_settings(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    generation: GenerationArguments,
    arguments: AnswerArguments,
) -> dict[str, Any]:
    """What answers depend on, beside the rows and what is asked about them."""
    described = [part.to_dict() for part in (model.config, model.generation_config, processor)]
    return {
        "weights": hash_weights(model.state_dict()),
        # With the same weights a model may merge other tokens, or its processor crop images otherwise.
        "configuration": _checksum([part | {"transformers_version": None} for part in described]),
        **vars(generation),
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
    }


def answer_pending(
    rows: Dataset,
    ids: Sequence[int | str],
    collate: Callable[[list[dict[str, Any]]], BatchFeature],
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    generation: GenerationArguments,
    arguments: AnswerArguments,
    folder: Path,
    state: PartialState,
) -> None:
    """Asks a model about each row that `folder` has no answer to yet; then its `answers.jsonl` has one to every row.

    Args:
        rows: What `collate` makes prompts of.
        ids: Of the rows, in their order.
        collate: Makes the prompts of a batch of rows. Beside the inputs it may give a list `errors`: None, or what is
            wrong with a row, which is then kept in place of what the model says about it.
        model, processor, generation, arguments: As in [`answer_rows`].
        folder: Where the answers are kept.
        state: From [`start_processes`]. Its processes part at the end.
    """
    path = folder / "answers.jsonl"
    if state.is_main_process:
        join_answers(folder, ids)
    state.wait_for_everyone()

    done = find_answers([path], ids)[:, 0] >= 0
    if state.is_main_process and done.any():
        print(f"{done.sum()} of {len(ids)} rows have been answered before.")
    batches = pending_batches(done, arguments.batch_size)
    first, last = (len(batches) * (state.process_index + step) // state.num_processes for step in (0, 1))
    mine = batches[first:last]  # neighbours, which may lie in the same file
    loader = DataLoader(rows, batch_sampler=mine, collate_fn=collate, num_workers=arguments.num_workers)
    generate = partial(
        generate_batches,
        model.to(state.device),
        processor=processor,
        generation=generation,
        dtype=DTYPES[arguments.dtype],
    )
    named = ([ids[index] for index in batch] for batch in mine)
    part = folder / f"answers.part-{state.process_index}.jsonl"
    _write_part(part, named, _answers(loader, generate), sum(map(len, mine)), state.is_main_process)

    state.wait_for_everyone()
    state.destroy_process_group()
    if state.is_main_process:
        join_answers(folder, ids)


def _answers(loader: DataLoader, generate: Callable[..., Iterator[list[str]]]) -> Iterator[list[dict[str, Any]]]:
    """Each batch's answers, as they are kept: a text, or in its place an error."""
    errors: deque[list[str | None] | None] = deque()

    def inputs() -> Iterator[BatchFeature]:
        for batch in loader:
            errors.append(batch.pop("errors", None))
            yield batch

    for texts in generate(inputs()):
        problems = errors.popleft() or [None] * len(texts)
        yield [
            {"text": text} if problem is None else {"text": None, "error": problem}
            for text, problem in zip(texts, problems, strict=True)
        ]


def _write_part(
    path: Path,
    ids: Iterator[list[int | str]],
    answers: Iterator[list[dict[str, Any]]],
    total: int,
    progress: bool,
) -> None:
    """Writes each batch's answers as soon as they come; `ids` are those of each batch."""
    bar = tqdm(total=total, desc="Answers", unit="row", disable=not progress)
    with bar, path.open("a", encoding="utf-8") as file:
        for rows, batch in zip(ids, answers, strict=True):
            entries = [{"id": row, **answer} for row, answer in zip(rows, batch, strict=True)]
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            file.flush()
            bar.update(len(rows))
            for problem in (entry["error"] for entry in entries if "error" in entry):
                bar.write(f"Left out: {problem}", file=sys.stderr)


def pending_batches(done: Sequence[bool], batch_size: int) -> list[range]:
    """Indices of the rows of each batch in which an answer is missing; batches always begin at the same rows."""
    starts = range(0, len(done), batch_size)
    batches = [range(start, min(start + batch_size, len(done))) for start in starts]
    return [batch for batch in batches if not all(done[batch.start : batch.stop])]


def read_answers(path: Path) -> dict[int | str, str]:
    """Answers by the id of their row, in the file's order; see [`read_lines`]."""
    return {entry["id"]: entry["text"] for _, entry in read_lines(path)}


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The answers in a file, and where each begins, in bytes; a last line that was cut off by a kill is left out.

    Raises:
        ValueError: If another line is broken.
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


def find_answers(files: list[Path], ids: Sequence[int | str]) -> np.ndarray:
    """Where the first answer to each row is, `(rows, 2)`: number of the file and place in bytes; -1 for none."""
    index = ids.index if isinstance(ids, range) else {row: index for index, row in enumerate(ids)}.__getitem__
    places = np.full((len(ids), 2), -1, dtype=np.int64)
    for number, file in enumerate(files):
        for offset, entry in read_lines(file):
            row = index(entry["id"])
            if places[row, 0] < 0:
                places[row] = number, offset
    return places


def join_answers(folder: Path, ids: Sequence[int | str]) -> None:
    """Moves the processes' parts into `answers.jsonl`, which exists afterwards, in the rows' order.

    An answer that is in `answers.jsonl` stays: a batch that was cut off is answered as a whole again. Answers stay on
    disk, of which there may be more than memory holds.
    """
    path, parts = folder / "answers.jsonl", sorted(folder.glob("answers.part-*.jsonl"))
    path.touch()
    if not parts:
        return
    places = find_answers([path, *parts], ids)
    with ExitStack() as stack, replacing(path) as partial_path:
        files = [stack.enter_context(file.open("rb")) for file in (path, *parts)]
        whole = stack.enter_context(partial_path.open("wb"))
        for number, offset in places[places[:, 0] >= 0]:
            files[number].seek(offset)
            whole.write(files[number].readline())
    for part in parts:
        part.unlink()


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Notes down what a run's answers depend on, or compares it with what the run began with.

    Raises:
        ValueError: If the folder holds answers that other settings gave; the message names these.
    """
    path = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"`output_dir`: {folder} has answers from other settings: {', '.join(changed)}. Remove it or name another."
        )


def _unique_ids(rows: Dataset) -> list[int | str]:
    ids = list(rows["id"])
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"The rows must have different ids, but {twice!r} is there twice.")
    return ids


def _checksum(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, default=str).encode()):08x}"
