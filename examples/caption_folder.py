"""Captions all images or videos in folders and shards, in any number, or answers one prompt about each of them.

    accelerate launch examples/caption_folder.py --model outputs/demo --inputs my_images --output_dir outputs/mine

`--inputs` are folders with all files below them, single files, patterns in quotes such as "photos/*.jpg", and shards.
Shards are WebDataset's `.tar`, and `.parquet` with images in `--column`. `--media video` captions videos and needs
`.[video]`. Several processes (`--num_processes 8`; on CPUs also `--multi_gpu`) share the work.

`captions.jsonl` has a row for each image, in the order of the names, with any number of processes. It has `file_name`,
relative to the folder of all inputs, `caption`, and an `error` if the image could not be read. Such images are named
as they come and counted at the end, and the run goes on. `--format parquet` or `csv` writes another table. A `.csv`
leaves such images out. `captions.html` shows some images with their captions. `--txt_files` writes a file for each
caption. A run that has ended can be started again for another format. `--evidence true` adds the least certain word
of each caption, and its numbers (docs/words.md). The page then shows the most doubtful captions.

A run that was interrupted goes on when it is started again. `items.arrow` lists the items at the first start; later
files are not on it. A file that was replaced since then, by its size or time, is captioned again. A shard that was
replaced is refused, and so are other settings and a second run in the same folder.
"""

import common.processes  # isort: skip  # first, since it sets how PyTorch's threads wait

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from caption_folder_items import ITEM, check_shards, is_current, list_items, read_item
from caption_folder_outputs import MAX_NAMES, shortened, write_batches, write_captions, write_page, write_txt_files
from datasets import Dataset
from PIL import Image
from tqdm import tqdm
from transformers import BatchFeature
from transformers.hf_argparser import HfArg

from common.arguments import AnswerArguments, FrameArguments, GenerationArguments, check_count, parse_arguments
from common.evaluation.answer_folder import SETTINGS, check_settings, has_answers, join_answers, run_folder
from common.evaluation.answers import answer_pending, answering_settings, load_answering_model, start_processes
from common.files import replacing
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import MAX_PIXELS

ITEMS = "items.arrow"


@dataclass
class FolderArguments(AnswerArguments, FrameArguments):
    inputs: list[str] = HfArg(default_factory=list, help="Folders, files, patterns, .tar and .parquet.")
    output_dir: str = HfArg(default="outputs/captions", help="Folder of the captions.")
    media: Literal["image", "video"] = HfArg(default="image", help="Type of the items.")
    column: str | None = HfArg(default=None, help="Column of a .parquet; default: image or video, as `--media`.")
    prompt: str = HfArg(default="", help="Prompt that stands with each item.")
    max_pixels: int = HfArg(default=MAX_PIXELS, help="Largest image or frame that is read, in pixels.")
    format: Literal["jsonl", "csv", "parquet"] = HfArg(default="jsonl", help="File type of the captions.")
    evidence: bool = HfArg(default=False, help="Add the least certain word of each caption, and its numbers.")
    txt_files: Literal["beside", "output"] | None = HfArg(
        default=None, help="Also write each caption into a .txt file: beside its image, or in output_dir/txt."
    )
    html_images: int = HfArg(default=100, help="Images at equal distances on the page captions.html; 0: no page.")

    def __post_init__(self) -> None:
        AnswerArguments.__post_init__(self)
        FrameArguments.__post_init__(self)
        check_count("max_pixels", self.max_pixels, 1)
        check_count("html_images", self.html_images, 0)


class ItemCollator:
    """Makes the prompts of items. A white image replaces an unreadable one; its caption is not kept."""

    def __init__(self, processor: EVLGenProcessor, folder_args: FolderArguments):
        self.processor = processor
        self.folder_args = folder_args
        white = Image.new("RGB", (32, 32), "white")
        self.stand_in = white if folder_args.media == "image" else [white]

    def __call__(self, items: list[dict[str, Any]]) -> BatchFeature:
        args = self.folder_args
        read = [read_item(item, *reading(args)) for item in items]
        batch = self.prompts([self.stand_in if media is None else media for media, _ in read])
        batch["details"] = [details for _, details in read]
        return batch

    def prompts(self, sources: list[Any]) -> BatchFeature:
        args, prompts = self.folder_args, [self.folder_args.prompt] * len(sources)
        return self.processor(**{f"{args.media}s": sources}, text=prompts, do_sample_frames=False)


def reading(args: FolderArguments) -> tuple[Any, ...]:
    """How items are opened: arguments of [`read_item`]."""
    return args.media, args.column, args.frames, args.max_pixels


def main(argv: list[str] | None = None) -> dict[str, int]:
    folder_args, generation_args = parse_arguments(FolderArguments, GenerationArguments, argv=argv)
    if not folder_args.inputs:
        raise ValueError("`inputs` is needed: folders, shards or files.")
    folder_args.column = folder_args.column or folder_args.media
    state = start_processes()
    folder = Path(folder_args.output_dir)
    with run_folder(folder, state):
        with state.main_process_first():  # the others read the list that it has written
            items = load_items(folder / ITEMS, folder_args, is_new=state.is_main_process and is_new_run(folder))
        model, processor = load_answering_model(folder_args)
        folder_args.complete_frames(processor)
        collate = ItemCollator(processor, folder_args)
        check_length(collate, model.config.text_config, generation_args.max_new_tokens)
        if state.is_main_process:
            settings = {
                "inputs": [os.path.abspath(source) for source in folder_args.inputs],
                **{name: getattr(folder_args, name) for name in ("media", "column", "prompt", "max_pixels")},
                **(folder_args.frames if folder_args.media == "video" else {"num_frames": None}),
                **({"evidence": True} if folder_args.evidence else {}),
                **answering_settings(model, processor, generation_args, folder_args),
            }
            check_settings(folder, settings)  # before answers are dropped
            check_shards(items)
            drop_changed(items, folder)
        ids = range(len(items))
        given = model, processor, generation_args, folder_args, folder, state, folder_args.evidence
        answer_pending(items, ids, collate, *given)
        return write_outputs(items, folder, folder_args) if state.is_main_process else {}


def is_new_run(folder: Path) -> bool:
    """Whether items are to be listed: a list without settings is of a run that ended before its first caption."""
    missing = [name for name in (SETTINGS, ITEMS) if not (folder / name).exists()]
    if missing and has_answers(folder):
        names = " and no ".join(missing)
        raise ValueError(f"`output_dir`: {folder} has answers, but no {names}. Remove it, or name another folder.")
    if not missing:
        print(f"Going on with the items in {folder / ITEMS}; files that came later are not on it.")
    return bool(missing)


def load_items(path: Path, folder_args: FolderArguments, is_new: bool) -> Dataset:
    """The list of items on disk; a new run lists them first."""
    if is_new:
        left_out: Counter = Counter()
        found = list_items(folder_args.inputs, folder_args.media, folder_args.column, left_out)
        with replacing(path) as partial_path, pa.ipc.new_stream(partial_path, ITEM) as writer:
            write_batches(writer, tqdm(found, desc="Items", unit="item"), ITEM)
        if counts := ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common()):
            print(f"Left out: {counts}.")
    try:
        items = Dataset.from_file(str(path))
        if items.column_names != ITEM.names:
            raise pa.ArrowInvalid(f"its columns are {items.column_names}")
    except (OSError, pa.ArrowException) as error:
        remedy = f"Remove {path.parent}, or name another folder."
        raise ValueError(f"`output_dir`: {path} is broken: {error}. {remedy}") from error
    if not len(items):
        path.unlink()
        raise ValueError(f"`inputs`: there is no {folder_args.media} in {folder_args.inputs}.")
    return items


def drop_changed(items: Dataset, folder: Path) -> None:
    """Removes the answers to files that were replaced since they were read, so that they are captioned again."""
    changed: list[int] = []

    def keep(answer: dict[str, Any]) -> bool:
        current = is_current(answer.get("source"))
        if not current:
            changed.append(answer["id"])
        return current

    join_answers(folder, range(len(items)), keep)
    if changed:
        names = [items[index]["file_name"] for index in sorted(changed[:MAX_NAMES])]
        print(f"{len(changed)} files changed and are captioned again: {shortened(names, len(changed))}")


def check_length(collate: ItemCollator, text_config: Any, max_new_tokens: int) -> None:
    """Raises a ValueError if the prompt and the longest caption do not fit the language model."""
    tokens = collate.prompts([collate.stand_in])["input_ids"].shape[1]
    limit = getattr(text_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens + max_new_tokens > limit:
        raise ValueError(
            f"`prompt` and image have {tokens} tokens and `max_new_tokens` is {max_new_tokens}, but the language "
            f"model takes at most {limit}."
        )


def write_outputs(items: Dataset, folder: Path, folder_args: FolderArguments) -> dict[str, int]:
    """Writes the captions as they are wanted, and returns the numbers of captioned and broken items."""
    if folder_args.txt_files:
        write_txt_files(items, folder, folder_args.txt_files)
    if folder_args.html_images:
        write_page(items, folder, folder_args.html_images, folder_args.evidence, *reading(folder_args))
    return write_captions(items, folder, folder_args.format, folder_args.evidence)


if __name__ == "__main__":
    common.processes.run_script(main)
