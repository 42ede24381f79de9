"""Captions all images or videos of a folder, or of shards, of any number; or answers one prompt about each.

    accelerate launch examples/caption_folder.py --model outputs/demo --inputs my_images --output_dir outputs/mine

`--inputs` are folders, in which everything below is looked at, single files, and shards: WebDataset's `.tar`, and
`.parquet`, whose images `--column` names. `--media video` captions videos, which needs `.[video]`. Several processes
(`--num_processes 8`; on CPUs also `--multi_gpu`) share the work.

`captions.jsonl`, or `captions.parquet` with `--format parquet`, has a row for each image, in the order of the names,
whatever the number of processes: `file`, `text`, and `error` where an image could not be read. Those are named as
they come and counted at the end, and stop nothing. A run that was cut off goes on when it is started again. What is to
be captioned is listed once, at the first start, in `items.arrow`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from caption_folder_items import ITEM, list_items, read_item
from datasets import Dataset
from PIL import Image
from pyarrow import parquet as pq
from tqdm import tqdm
from transformers import BatchFeature

from common.command_line import parse_arguments
from common.evaluation.answers import (
    answer_pending,
    answering_settings,
    check_settings,
    load_answering_model,
    read_lines,
    start_processes,
)
from common.evaluation.evaluation_arguments import AnswerArguments, GenerationArguments
from common.files import replacing
from processing_evlgen import EVLGenProcessor

ROWS = 10_000  # that are held in memory to be written together
NAMED = 10  # unreadable items that are named once more at the end
CAPTION = pa.schema({"file": pa.string(), "text": pa.string(), "error": pa.string()})


@dataclass
class FolderArguments(AnswerArguments):
    inputs: list[str] = field(default_factory=list, metadata={"help": "Folders, .tar and .parquet shards, files."})
    output_dir: str = field(default="outputs/captions", metadata={"help": "Where the captions go."})
    media: Literal["image", "video"] = field(default="image", metadata={"help": "What to caption."})
    column: str | None = field(
        default=None, metadata={"help": "Column of a .parquet; default: image, or video with `--media video`."}
    )
    num_frames: int = field(default=4, metadata={"help": "Frames taken of each video, at equal distances."})
    prompt: str = field(default="", metadata={"help": "What the model is told along with each image."})
    format: Literal["jsonl", "parquet"] = field(default="jsonl", metadata={"help": "Of the captions."})


class ItemCollator:
    """Makes prompts of items. For one that cannot be read stands a white image, whose caption is not kept."""

    def __init__(self, processor: EVLGenProcessor, arguments: FolderArguments):
        self.processor = processor
        self.arguments = arguments

    def __call__(self, items: list[dict[str, Any]]) -> BatchFeature:
        media, errors, sources = self.arguments.media, [], []
        white = Image.new("RGB", (32, 32), "white")
        for item in items:
            try:
                sources.append(read_item(item, media, self.arguments.column, self.arguments.num_frames))
                errors.append(None)
            except ValueError as error:
                sources.append(white if media == "image" else [white])
                errors.append(str(error).encode(errors="backslashreplace").decode())  # of odd names
        batch = self.prompts(sources)
        batch["errors"] = errors
        return batch

    def prompts(self, sources: list[Any]) -> BatchFeature:
        frames = {"num_frames": self.arguments.num_frames} if self.arguments.media == "video" else {}
        prompts = [self.arguments.prompt] * len(sources)
        return self.processor(**{f"{self.arguments.media}s": sources}, text=prompts, **frames)


def main(argv: list[str] | None = None) -> dict[str, int]:
    arguments, generation = parse_arguments(FolderArguments, GenerationArguments, argv=argv)
    if not arguments.inputs:
        raise ValueError("`inputs` is needed: folders, shards or files.")
    arguments.column = arguments.column or arguments.media
    state = start_processes()
    folder = Path(arguments.output_dir)
    with state.main_process_first():
        path = folder / "items.arrow"
        if path.exists() and state.is_main_process:
            print(f"What {path} lists is captioned; files that came later are not on it.")
        items = load_items(path, arguments)
    model, processor = load_answering_model(arguments)
    collate = ItemCollator(processor, arguments)
    check_length(collate, model.config.text_config, generation.max_new_tokens)
    if state.is_main_process:
        settings = {
            "inputs": [os.path.abspath(given) for given in arguments.inputs],
            "media": arguments.media,
            "column": arguments.column,
            "prompt": arguments.prompt,
            "num_frames": arguments.num_frames if arguments.media == "video" else None,
            **answering_settings(model, processor, generation, arguments),
        }
        check_settings(folder, settings)
    answer_pending(items, range(len(items)), collate, model, processor, generation, arguments, folder, state)
    if not state.is_main_process:
        return {}
    return write_captions(items, folder, arguments.format)


def load_items(path: Path, arguments: FolderArguments) -> Dataset:
    """The list of what is to be captioned, from disk; if it is not there, it is made.

    Raises:
        ValueError: If there is nothing to be captioned, or an input cannot be used.
    """
    if not path.exists():
        left_out: Counter = Counter()
        found = list_items(arguments.inputs, arguments.media, arguments.column, left_out)
        items = iter(tqdm(found, desc="Items", unit="item"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial_path, pa.ipc.new_stream(partial_path, ITEM) as writer:
            while batch := list(islice(items, ROWS)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=ITEM))
        if others := ", ".join(f"{count} {kind}" for kind, count in left_out.most_common()):
            print(f"Left out: {others}.")
    items = Dataset.from_file(str(path))
    if not len(items):
        path.unlink()
        raise ValueError(f"`inputs`: there is no {arguments.media} in {arguments.inputs}.")
    return items


def check_length(collate: ItemCollator, text_config: Any, max_new_tokens: int) -> None:
    """
    Raises:
        ValueError: If the language model has no places for the prompt and the longest caption.
    """
    white = Image.new("RGB", (32, 32), "white")
    tokens = collate.prompts([white if collate.arguments.media == "image" else [white]])["input_ids"].shape[1]
    limit = getattr(text_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens + max_new_tokens > limit:
        raise ValueError(
            f"`prompt` and image have {tokens} tokens and `max_new_tokens` is {max_new_tokens}, but the language "
            f"model has places for {limit}."
        )


def write_captions(items: Dataset, folder: Path, kind: str) -> dict[str, int]:
    """Writes the answers with the items' names, and says how many there are.

    Args:
        items: The list.
        folder: Where `answers.jsonl` is, with an answer to each of them.
        kind: `"jsonl"` or `"parquet"`.

    Returns:
        How many were `"captioned"`, and how many `"broken"`.
    """
    path, counts, named = folder / f"captions.{kind}", Counter(captioned=0, broken=0), []

    def rows() -> Iterator[dict[str, Any]]:
        answers = read_lines(folder / "answers.jsonl")
        for item, (_, answer) in zip(items.select_columns("file"), answers, strict=True):
            broken = "error" in answer
            counts["broken" if broken else "captioned"] += 1
            if broken and len(named) < NAMED:
                named.append(item["file"])
            yield {"file": item["file"], "text": answer["text"], **({"error": answer["error"]} if broken else {})}

    with replacing(path) as partial_path:
        (write_jsonl if kind == "jsonl" else write_parquet)(partial_path, tqdm(rows(), "Writing", len(items)))
    print(f"{path} holds {counts['captioned']} captions.")
    if named:
        more = ", …" if counts["broken"] > len(named) else ""
        print(f"{counts['broken']} could not be read and have an `error` there: {', '.join(named)}{more}")
    return dict(counts)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    remaining = iter(rows)
    with pq.ParquetWriter(path, CAPTION) as writer:
        while batch := list(islice(remaining, ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=CAPTION))


if __name__ == "__main__":
    main()
