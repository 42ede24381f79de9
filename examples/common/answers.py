"""What a model says about every row of a benchmark: shared out among processes, and kept as it comes.

The folder of a run holds `settings.json`, what its answers depend on, and `answers.jsonl`, one row in each line; while
it runs, each process writes a part of that file. Batches are the same whoever computes them, so that neither the
number of processes nor an interruption changes an answer.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.arguments import DataArguments, EvaluationArguments, GenerationArguments
from common.data import CaptionCollator
from common.evaluation import generate_batches
from common.models import load_captioner
from common.processes import use_all_cores
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import load_rgb_image
from processing_evlgen.videos import load_rgb_frames

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PromptCollator(CaptionCollator):
    """Prompts of rows that need no captions, but an `id`, which an unreadable picture is reported with."""

    def read(self, row: dict[str, Any]) -> Image.Image | list[Image.Image]:
        try:
            if self.arguments.video_column:
                return load_rgb_frames(row[self.arguments.video_column], self.arguments.num_frames)
            return load_rgb_image(row[self.arguments.image_column])
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
    folder: Path,
    state: PartialState,
) -> list[str] | None:
    """Loads the model and asks it about each row that `folder` has no answer to yet.

    Args:
        rows: With a column `id`, and those that `columns` names.
        columns: Columns of pictures, clips and questions; the prompt.
        generation: How to decode.
        evaluation: Which model, in what precision, how many rows at a time.
        folder: Where the answers are kept.
        state: From [`start_processes`].

    Returns:
        On the main process, all answers in the order of the rows; None on others.

    Raises:
        ValueError: If the model cannot be loaded, ids are not unique, a picture cannot be read, or the answers in
            `folder` come from other settings.
    """
    if evaluation.dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {evaluation.dtype!r}.")
    if not len(rows):
        raise ValueError("There is nothing to evaluate: the split has no rows, or `max_samples` is 0.")
    ids = _unique_ids(rows)
    dtype = DTYPES[evaluation.dtype]
    load = partial(EVLGenForConditionalGeneration.from_pretrained, dtype=dtype)
    model = load_captioner("model", load, evaluation.model)
    processor = EVLGenProcessor.from_pretrained(evaluation.model)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        prompts = rows[columns.prompt_column][:] if columns.prompt_column else None
        settings = {
            "weights": weights_checksum(model),
            "rows": _checksum([ids, prompts]),
            "prompt": columns.prompt,
            "num_frames": columns.num_frames if columns.video_column else None,
            **vars(generation),
            "batch_size": evaluation.batch_size,
            "dtype": evaluation.dtype,
        }
        check_settings(folder, settings)
        join_answers(folder, ids)
    state.wait_for_everyone()

    done = read_answers(folder / "answers.jsonl")
    if state.is_main_process and done:
        print(f"{len(done)} of {len(ids)} rows have been answered before.")
    mine = pending_batches(ids, done, evaluation.batch_size)[state.process_index :: state.num_processes]
    loader = DataLoader(
        rows,
        batch_sampler=mine,
        collate_fn=PromptCollator(processor, columns, training=False).prompts,
        num_workers=evaluation.num_workers,
    )
    batches = generate_batches(model.to(state.device), loader, processor, generation, dtype)
    named = [[ids[index] for index in batch] for batch in mine]
    _write_part(folder / f"answers.part-{state.process_index}.jsonl", named, batches, state.is_main_process)

    state.wait_for_everyone()
    state.destroy_process_group()
    return list(join_answers(folder, ids).values()) if state.is_main_process else None


def _write_part(path: Path, ids: list[list[int | str]], batches: Iterator[list[str]], progress: bool) -> None:
    """Writes each batch's answers as soon as they come; `ids` are those of each batch."""
    bar = tqdm(total=sum(map(len, ids)), desc="Answers", unit="row", disable=not progress)
    with bar, path.open("a", encoding="utf-8") as file:
        for rows, texts in zip(ids, batches, strict=True):
            file.writelines(_line(row, text) for row, text in zip(rows, texts, strict=True))
            file.flush()
            bar.update(len(rows))


def _line(row: int | str, text: str) -> str:
    return json.dumps({"id": row, "text": text}, ensure_ascii=False) + "\n"


def pending_batches(ids: list[int | str], done: dict[int | str, str], batch_size: int) -> list[list[int]]:
    """Indices of the rows of each batch in which an answer is missing; batches always begin at the same rows."""
    batches = [list(range(start, min(start + batch_size, len(ids)))) for start in range(0, len(ids), batch_size)]
    return [batch for batch in batches if any(ids[index] not in done for index in batch)]


def read_answers(path: Path) -> dict[int | str, str]:
    """Answers by the id of their row; a last line that was cut off by a kill is left out.

    Raises:
        ValueError: If another line is broken.
    """
    answers: dict[int | str, str] = {}
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            answers[entry["id"]] = entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`output_dir`: line {number} of {path} is broken: {error}") from error
    return answers


def join_answers(folder: Path, ids: list[int | str]) -> dict[int | str, str]:
    """Moves the processes' parts into `answers.jsonl`, which exists afterwards; gives all answers in the rows' order.

    An answer that is in `answers.jsonl` stays: a batch that was cut off is answered as a whole again.
    """
    path, parts = folder / "answers.jsonl", sorted(folder.glob("answers.part-*.jsonl"))
    found: dict[int | str, str] = {}
    for file in (*parts, path):
        found |= read_answers(file) if file.exists() else {}
    answers = {row: found[row] for row in ids if row in found}
    write_whole(path, "".join(_line(row, text) for row, text in answers.items()))
    for part in parts:
        part.unlink()
    return answers


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Notes down what a run's answers depend on, or compares it with what the run began with.

    Raises:
        ValueError: If the folder holds answers that other settings gave; the message names these.
    """
    path = folder / "settings.json"
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


def weights_checksum(model: torch.nn.Module) -> str:
    """A checksum of all weights, as they are in memory."""
    checksum = 0
    for _, tensor in sorted(model.state_dict().items()):
        checksum = zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def write_whole(path: Path, text: str) -> None:
    """Writes a file that, whenever the process is killed, is either the old or the new one."""
    partial_path = path.with_name(f".{path.name}.tmp")
    partial_path.write_text(text, encoding="utf-8")
    os.replace(partial_path, path)


def _unique_ids(rows: Dataset) -> list[int | str]:
    ids = list(rows["id"])
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"The rows must have different ids, but {twice!r} is there twice.")
    return ids


def _checksum(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value).encode()):08x}"
