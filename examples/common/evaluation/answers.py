"""Answers the rows of a data set with a model, shared among processes.

Batches are the same for any number of processes and after any interruption. So neither changes an answer.
"""

import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
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
from transformers import BatchFeature

from common.arguments import AnswerArguments, DataArguments, DatasetArguments, EvaluationArguments, GenerationArguments
from common.data.collator import CaptionCollator
from common.data.loading import load_splits, select_split
from common.data.rows import open_media
from common.evaluation.answer_folder import ANSWERS, check_settings, find_answers, join_answers, read_answers
from common.evaluation.captions import generate_answers
from common.models import load_captioner
from common.processes import use_all_cores
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import hash_weights
from processing_evlgen import EVLGenProcessor

# Arguments that give the origin of the rows. Answers do not depend on the annotations.
SOURCE = ("benchmark", "dataset_config", "data_files", "test_split", "test_size", "media_dir", "max_test_samples")


class PromptCollator(CaptionCollator):
    """Makes prompts of rows without captions. An error about an unreadable image names the row by its `id`."""

    def read(self, row: dict[str, Any]) -> Image.Image | list[Image.Image]:
        try:
            return open_media(row, self.data_args)
        except ValueError as error:
            raise ValueError(f"row {row['id']}: {error}") from error


def start_processes() -> PartialState:
    """Finds the other processes of `accelerate launch`, if any, and the device of this one."""
    # A process that has finished its share waits for the others, possibly for hours.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    use_all_cores(state.device)
    return state


def load_dataset_rows(
    name: str, evaluation_args: EvaluationArguments, references: str, caption_column: str, **columns: Any
) -> tuple[Dataset, DataArguments]:
    """Loads a split of a data set with the columns `id` and `references`, which holds the true texts as lists.

    A cell of `caption_column` holds a text, several texts, or VQAv2's dicts with an `answer`; else it raises a
    ValueError. `columns` are further arguments of the data.
    """
    given = {field.name: getattr(evaluation_args, field.name) for field in fields(DatasetArguments)}
    data_args = DataArguments(**{**given, **columns, "dataset": name, "caption_column": caption_column})
    rows = select_split(load_splits(data_args), "test_split", data_args, None)
    true_texts = [_list_texts(value) for value in rows[caption_column]]
    rows = rows.remove_columns(caption_column).add_column(references, true_texts)
    return rows.add_column("id", list(range(len(rows)))), data_args


def _list_texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value or []
    texts = [text["answer"] if isinstance(text, dict) else text for text in texts]
    if not all(isinstance(text, str) for text in texts) or not any(text.strip() for text in texts):
        raise ValueError(f"`caption_column` must hold a text or several, but a row holds {value!r}.")
    return texts


def answer_rows(
    name: str,
    rows: Dataset,
    data_args: DataArguments,
    generation_args: GenerationArguments,
    evaluation_args: EvaluationArguments,
    folder: Path,
    state: PartialState,
) -> list[str] | None:
    """Loads the model and answers each row that has no answer in `folder` yet.

    The rows have a column `id`, and the columns that `data_args` names. `name` is that of their benchmark or data set.
    Answers from other data, settings, rows, images or another model are refused with a ValueError. Returns all answers
    in the order of the rows on the main process, and None on others.
    """
    if not len(rows):
        raise ValueError("There is nothing to evaluate: the split has no rows.")
    ids = list(rows["id"])
    if len(set(ids)) < len(ids):
        repeated = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"The rows must have different ids, but {repeated!r} is there twice.")
    # Before the model is loaded, which may take minutes.
    checksums = row_checksums(rows, ids, data_args) if state.is_main_process else {}
    model, processor = load_answering_model(evaluation_args)
    data_args.complete_frames(processor)
    if state.is_main_process:
        settings = {
            "dataset": None if evaluation_args.benchmark else name,
            **{argument: getattr(evaluation_args, argument) for argument in SOURCE},
            **checksums,
            "prompt": data_args.prompt,
            **(data_args.frames if data_args.video_column else {"num_frames": None}),
            **answering_settings(model, processor, generation_args, evaluation_args),
        }
        check_settings(folder, settings)
    collate = PromptCollator(processor, data_args, training=False).prompts
    answer_pending(rows, ids, collate, model, processor, generation_args, evaluation_args, folder, state)
    return list(read_answers(folder / ANSWERS).values()) if state.is_main_process else None


def row_checksums(rows: Dataset, ids: list[int | str], data_args: DataArguments) -> dict[str, str]:
    """Checksums of ids and questions, and of media: a file's name, size and time of change, or else the bytes."""
    questions = rows[data_args.prompt_column][:] if data_args.prompt_column else None
    digest = hashlib.sha256()
    column = data_args.video_column or data_args.image_column
    for row, value in zip(ids, rows.select_columns(column), strict=True):
        try:
            digest.update(repr(_identify_medium(value[column])).encode())
        except (OSError, TypeError) as error:
            raise ValueError(f"row {row}: `{column}` is missing: {error}") from error
    return {"rows": checksum([ids, questions]), "images": digest.hexdigest()[:16]}


def _identify_medium(medium: Any) -> Any:
    if isinstance(medium, list):  # the frames of a video
        return [_identify_medium(frame) for frame in medium]
    if isinstance(medium, dict):  # a cell of a `datasets` column of images or videos
        medium = medium["path"] if medium.get("bytes") is None else medium["bytes"]
    if medium is None:
        raise TypeError("there is none")
    if isinstance(medium, bytes):
        return zlib.crc32(medium)  # notices a change; it need not withstand an attack
    if not isinstance(medium, str) or medium.startswith(("http://", "https://", "data:")):
        return medium
    status = os.stat(medium)
    return Path(medium).name, status.st_size, status.st_mtime_ns


def load_answering_model(answer_args: AnswerArguments) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    """Loads a model in the precision in which it answers, and its processor with the requested tiles and tokens."""
    model = load_captioner(answer_args.model, dtype=getattr(torch, answer_args.dtype))
    processor = EVLGenProcessor.from_pretrained(answer_args.model, **answer_args.layout)
    model.config.read_budgets("num_image_tokens", processor.num_image_tokens, 1)  # raises out of range
    if processor.max_tiles > 1:
        model.config.check_tiles()
    return model, processor


def answering_settings(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    generation_args: GenerationArguments,
    answer_args: AnswerArguments,
) -> dict[str, Any]:
    """All that answers depend on, except the rows and their prompts."""
    parts = [part.to_dict() for part in (model.config, model.generation_config, processor)]
    requested = {name: parts[-1].pop(name) for name in ("max_tiles", "num_image_tokens")}
    return {
        "weights": hash_weights(model.state_dict()),
        # With the same weights a model may merge other tokens, or its processor may crop images in another way.
        "configuration": checksum([part | {"transformers_version": None} for part in parts]),
        **requested,
        **vars(generation_args),
        "batch_size": answer_args.batch_size,
        "dtype": answer_args.dtype,
    }


def checksum(value: Any) -> str:
    """A short checksum of a value that can be written as JSON."""
    return f"{zlib.crc32(json.dumps(value, default=str).encode()):08x}"


def answer_pending(
    rows: Dataset,
    ids: Sequence[int | str],
    collate: Callable[[list[dict[str, Any]]], BatchFeature],
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    generation_args: GenerationArguments,
    answer_args: AnswerArguments,
    folder: Path,
    state: PartialState,
    evidence: bool = False,
) -> None:
    """Answers each row that has no answer in `folder` yet. Afterwards `answers.jsonl` has an answer to every row.

    `collate` makes the prompts of a batch of rows. It may add a list `details`: what is kept beside the text of each
    row. A row with an `"error"` gets no text. With `evidence`, an answer has its least certain word, too. The
    processes separate at the end.
    """
    path = folder / ANSWERS
    if state.is_main_process:
        join_answers(folder, ids)
    state.wait_for_everyone()

    # Every process reads the same file, and so computes the same batches.
    answered = find_answers([path], ids)[:, 0] >= 0
    if state.is_main_process and answered.any():
        print(f"{answered.sum()} of {len(ids)} rows have been answered before.")
    # Batches always begin at the same rows.
    size = answer_args.batch_size
    batches = [range(start, min(start + size, len(ids))) for start in range(0, len(ids), size)]
    batches = [batch for batch in batches if not answered[batch.start : batch.stop].all()]
    start, end = (len(batches) * (state.process_index + step) // state.num_processes for step in (0, 1))
    share = batches[start:end]  # neighbours, which often lie in the same file
    loader = DataLoader(rows, batch_sampler=share, collate_fn=collate, num_workers=answer_args.num_workers)
    options = {"processor": processor, "generation_args": generation_args, "dtype": getattr(torch, answer_args.dtype)}
    seconds: Counter = Counter()
    generate = partial(generate_answers, model.to(state.device), **options, seconds=seconds if evidence else None)
    part = folder / f"answers.part-{state.process_index}.jsonl"
    write_part(part, ids, share, loader, generate, state.is_main_process)
    if seconds and state.is_main_process:
        texts, words = (seconds[name] / sum(map(len, share)) for name in ("texts", "evidence"))
        print(f"A caption took {texts:.3f} s, and its evidence {words:.3f} s ({words / texts:.0%}).")

    state.wait_for_everyone()
    state.destroy_process_group()  # the main process scores alone, and the others end
    if state.is_main_process:
        join_answers(folder, ids)


def write_part(
    path: Path,
    ids: Sequence[int | str],
    share: list[range],
    loader: DataLoader,
    generate: Callable[[BatchFeature], list[dict[str, Any]]],
    progress: bool,
) -> None:
    """Writes the answers to each batch as soon as they are generated, so that a kill loses one batch at most."""
    bar = tqdm(total=sum(map(len, share)), desc="Answers", unit="row", disable=not progress)
    with bar, path.open("a", encoding="utf-8") as file:
        for indices, batch in zip(share, loader, strict=True):
            details = batch.pop("details", [{}] * len(indices))
            for index, answer, detail in zip(indices, generate(batch), details, strict=True):
                answer = {"text": None} if "error" in detail else answer
                file.write(json.dumps({"id": ids[index], **answer, **detail}) + "\n")
                if "error" in detail:
                    bar.write(f"Left out: {detail['error']}", file=sys.stderr)
            file.flush()
            bar.update(len(indices))
