"""Training and held-out rows from a demo, a folder, files or the Hub, or from several of these, mixed by weight."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    Video,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
)
from transformers.utils import logging

from common.arguments import DataArguments
from common.data.rows import group_rows, read_row, skip_or_raise, split_texts
from common.data.streams import CaptionStream, Source, tolerant_reading
from common.demo.crowded_scenes import load_crowded_questions, load_crowded_scenes
from common.demo.easy_vqa import load_easy_vqa, load_easy_vqa_questions
from common.demo.emoji_videos import load_emoji_videos
from common.demo.scenes import load_scenes
from common.files import is_local, media_paths

logger = logging.get_logger(__name__)

DEMO_DATASETS = {
    "openmoji-scenes": load_scenes,
    "crowded-scenes": load_crowded_scenes,
    "crowded-questions": load_crowded_questions,
    "easy-vqa": load_easy_vqa,
    "easy-vqa-questions": load_easy_vqa_questions,
    "emoji-videos": lambda: load_dataset(str(load_emoji_videos())),
}
ROW = "__row__"  # the number of a text's row, while texts are grouped
WEBDATASET_COLUMNS = ("__key__", "__url__")  # the origin of a row
COLUMN_ARGUMENTS = ("image_column", "video_column", "caption_column", "prompt_column", "messages_column")
DATASET_ARGUMENTS = ("dataset", "data_files", "dataset_config", "train_split", "streaming", "max_train_samples")
DATASET_ARGUMENTS += ("group_by", "image_root")
SPLIT_SEED = 0  # of `test_size`: runs with other seeds and lengths hold out the same rows


def load_datasets(data_args: DataArguments, seed: int) -> tuple[Dataset | CaptionStream, Dataset | None]:
    """Loads the training and the held-out split. Images stay encoded until a batch is made of them.

    Without streaming, an epoch of a mixture has every row of each data set at least once. It ends with the data set
    that is largest for its weight, and repeats rows of the others. A stream does not end. `seed` is for mixing and for
    shuffling streams, which the Trainer cannot shuffle. The held-out split has no bad rows. Raises a ValueError if
    arguments contradict each other, a split, column or file does not exist, a held-out row is bad and not to be
    skipped, or columns of a mixture differ in type.
    """
    check_arguments(data_args)
    with tolerant_reading():
        splits = load_splits(data_args) if data_args.dataset else {}
        train = load_training_split(data_args, splits, seed)
        if not data_args.test_split and data_args.test_size is None:
            return train, None
        test = select_split(splits, "test_split", data_args, data_args.max_test_samples)
        if isinstance(test, IterableDataset):  # it is read many times, in several orders
            test = Dataset.from_list(list(test), features=test.features)
        test = arrange_texts(test, data_args, groups=bool(data_args.group_by and not data_args.prompt_column))
    good = []
    for index, row in enumerate(test):
        try:
            read_row(row, data_args)
            good.append(index)
        except ValueError as error:
            skip_or_raise(row, data_args, error)
    return train, test if len(good) == len(test) else test.select(good)


def check_arguments(data_args: DataArguments) -> None:
    """Raises a ValueError if arguments contradict each other, or there is no data set."""
    if data_args.cache_features and data_args.streaming:
        raise ValueError("`cache_features` needs the whole data set, so it cannot be set with `streaming`.")
    views, draws = data_args.cached_views, data_args.draws_views
    if data_args.cache_features and draws and views is None:
        raise ValueError(
            "`cache_features`: crops, flips or the `num_frames` of videos needs `cached_views`: how many."
        )
    if views is not None and not (data_args.cache_features and draws and views > 0):
        raise ValueError(
            f"`cached_views` is {views}: it must be 1 or more, and goes with `cache_features` and with `crop_scale`, "
            "`horizontal_flip` or the `num_frames` of videos."
        )
    if data_args.streaming and data_args.test_split and data_args.max_test_samples is None:
        raise ValueError("`streaming` needs `max_test_samples`, or an empty `test_split`.")
    if data_args.test_size is not None and (data_args.streaming or data_args.mixture):
        raise ValueError("`test_size` divides one whole data set: it cannot be set with `streaming` or `mixture`.")
    if data_args.messages_column and (data_args.group_by or data_args.texts_per_image):
        raise ValueError("`messages_column` has one conversation in a row: no `group_by` and no `texts_per_image`.")
    if not data_args.dataset and not data_args.mixture:
        raise ValueError("`dataset` is needed: a demo, a folder, a name on the Hub, or a kind of file.")
    if not data_args.dataset and data_args.test_split:
        raise ValueError("`mixture` needs a `dataset` with held-out rows, or an empty `test_split`.")


@tolerant_reading()
def load_splits(data_args: DataArguments) -> DatasetDict | IterableDatasetDict:
    """All splits of a data set by name. A ValueError names a data set that is missing or cannot be read."""
    if data_args.dataset in DEMO_DATASETS:
        return DEMO_DATASETS[data_args.dataset]()
    name, folder = data_args.dataset, None
    if os.path.isdir(name) and all(any(Path(name).rglob(pattern)) for pattern in ("*.txt", "metadata.*")):
        # Where captions lie in files beside the images, `datasets` would read these files alone.
        name, folder = "videofolder" if data_args.video_column == "video" else "imagefolder", name
    try:
        return load_dataset(
            name,
            data_args.dataset_config,
            data_dir=folder,
            data_files=data_args.data_files or None,
            streaming=data_args.streaming,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`dataset` is {data_args.dataset!r}, which is no folder, none of {', '.join(DEMO_DATASETS)}, and cannot "
            f"be had from the Hub: {error}"
        ) from error
    except Exception as error:  # builders of `datasets` raise errors of many types
        cause = error if isinstance(error, ImportError) else error.__cause__ or error  # names what to install
        hint = " A metadata.jsonl holds one JSON object a line, in UTF-8." if os.path.isdir(data_args.dataset) else ""
        empty = [str(path) for path in Path(data_args.dataset).rglob("metadata.*") if path.stat().st_size < 3]
        hint += f" Empty: {', '.join(empty)}." if hint and empty else ""
        raise ValueError(
            f"`dataset`: {data_args.dataset!r} cannot be read: {type(cause).__name__}: {cause}.{hint}"
        ) from error


def load_training_split(data_args: DataArguments, splits: Any, seed: int) -> Dataset | CaptionStream:
    """The training split of one data set, or of a mixture."""
    parts = read_mixture(data_args)  # one part without a mixture
    groups = any(part.group_by for _, part in parts)
    loaded = []
    for _, part in parts:
        rows = splits if part is data_args else load_splits(part)
        rows = select_split(rows, "train_split", part, part.max_train_samples)
        names = {getattr(part, column): getattr(data_args, column) for column in data_args.used_columns}
        renamed = {own: shared for own, shared in names.items() if own != shared}
        rows = rows.rename_columns(renamed) if renamed else rows
        if groups and isinstance(rows, Dataset):
            rows = arrange_texts(rows, replace(data_args, group_by=part.group_by), groups=True)
        loaded.append(rows)
    weights = [weight for weight, _ in parts]
    if data_args.streaming:
        sources = [as_source(rows, part, weight) for rows, (weight, part) in zip(loaded, parts, strict=True)]
        for source, (_, part) in zip(sources, parts, strict=True):
            if groups:
                source.group = partial(group_rows, data_args=replace(data_args, group_by=part.group_by))
        return CaptionStream(sources, seed, data_args.shuffle_buffer)
    if len(loaded) == 1:
        return loaded[0]
    probabilities = [weight / sum(weights) for weight in weights]
    try:
        return interleave_datasets(loaded, probabilities, seed, stopping_strategy="all_exhausted")
    except ValueError as error:
        raise ValueError(f"`mixture`: columns of its data sets are of different types: {error}") from error


def read_mixture(data_args: DataArguments) -> list[tuple[float, DataArguments]]:
    """The weight and the arguments of each data set to train on. A ValueError says what an entry has wrong."""
    if not data_args.mixture:
        return [(1.0, data_args)]
    entries = data_args.mixture
    if isinstance(entries, str):
        if not Path(entries).is_file():
            raise ValueError(f"`mixture` is {entries!r}, which is no YAML file (nor a list, as JSON).")
        try:
            entries = yaml.safe_load(Path(entries).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`mixture`: {entries} is no YAML: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"`mixture` must be a list of data sets, each with a weight, but is {entries!r}.")
    return [_read_entry(entry, data_args) for entry in entries]


def _read_entry(entry: dict[str, Any], data_args: DataArguments) -> tuple[float, DataArguments]:
    shown = json.dumps(entry, ensure_ascii=False)
    unknown = sorted(entry.keys() - {"weight", *DATASET_ARGUMENTS, *COLUMN_ARGUMENTS})
    if unknown:
        raise ValueError(f"`mixture`: {shown} holds unknown names: {', '.join(unknown)}.")
    if not entry.get("dataset"):
        raise ValueError(f"`mixture`: {shown} needs a `dataset`.")
    weight = entry.get("weight")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
        raise ValueError(f"`mixture`: {shown} needs a `weight` above 0, but has {weight!r}.")
    if entry.get("streaming") and not data_args.streaming:
        raise ValueError(f"`mixture`: {shown} is to be streamed, which takes `--streaming true` for all.")
    for column in COLUMN_ARGUMENTS:
        shared = getattr(data_args, column)
        if bool(entry.get(column, shared)) != bool(shared):
            raise ValueError(f"`mixture`: {shown} sets `{column}`, but the mixture has it at {shared!r}.")
    # Files and configuration of the held-out data set are not an entry's.
    fields = {"data_files": None, "dataset_config": None, "image_root": None, **entry}
    fields.pop("weight")
    return float(weight), replace(data_args, mixture=None, **fields)


def select_split(
    splits: Any, argument: str, data_args: DataArguments, max_samples: int | None
) -> Dataset | IterableDataset:
    """The first rows of a split, with the columns that are used. Under `test_size` it is a part of `train_split`.

    A ValueError names a missing split or column, and the first files that are missing.
    """
    source = argument if data_args.test_size is None else "train_split"
    name = getattr(data_args, source)
    if name not in splits:
        hint = '; --test_size 0.1 holds out a tenth of a split, and --test_split "" nothing'
        hint = "" if source == "train_split" else hint
        raise ValueError(f"`{source}` is {name!r}, but the data set has {sorted(splits)}{hint}.")
    rows = splits[name]
    columns = rows.column_names or list(next(iter(rows)))  # a stream may not know its columns
    used = {argument: getattr(data_args, argument) for argument in data_args.used_columns}
    for column_argument, column in used.items():
        if column not in columns:
            raise ValueError(f"`{column_argument}` is {column!r}, but the data set has {columns}.")
    media_column = next(iter(used.values()))
    feature = None if rows.features is None else rows.features[media_column]
    if isinstance(feature, Image | Video):
        rows = rows.cast_column(media_column, type(feature)(decode=False))
    if data_args.group_by and data_args.group_by not in columns:
        raise ValueError(f"`group_by` is {data_args.group_by!r}, but the data set has {columns}.")
    kept = dict.fromkeys([*used.values(), *filter(None, [data_args.group_by])])
    rows = rows.select_columns([*kept, *(column for column in WEBDATASET_COLUMNS if column in columns)])
    if data_args.test_size is not None:
        rows = rows.select(hold_out(rows, data_args)[argument == "test_split"])
    if max_samples is not None:
        rows = rows.take(max_samples if isinstance(rows, IterableDataset) else min(max_samples, len(rows)))
    return locate_files(rows, media_column, name, data_args)


def hold_out(rows: Dataset, data_args: DataArguments) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on, and of those held out by `test_size`. Rows of one image stay together."""
    column = data_args.group_by or getattr(data_args, data_args.used_columns[0])
    is_name = data_args.group_by or rows.features[column] in (Value("string"), Value("large_string"))
    names = rows[column] if is_name else [None] * len(rows)
    numbers: dict[Any, int] = {}  # of each image
    images = [
        numbers.setdefault((row,) if name is None else str(name), len(numbers)) for row, name in enumerate(names)
    ]
    size = data_args.test_size
    count = max(1, round(size * len(numbers))) if size < 1 else int(size)
    if count >= len(numbers):
        raise ValueError(f"`test_size` is {size}, but `{data_args.train_split}` has {len(numbers)} images.")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(numbers))
    is_held_out = np.isin(images, order[:count])
    return np.flatnonzero(~is_held_out).tolist(), np.flatnonzero(is_held_out).tolist()


def locate_files(
    rows: Dataset | IterableDataset, column: str, split: str, data_args: DataArguments
) -> Dataset | IterableDataset:
    """Makes relative paths absolute, and raises a ValueError if local files are missing. A stream is not checked."""
    if isinstance(rows, IterableDataset) and isinstance((rows.features or {}).get(column), Image | Video):
        return rows
    first = next(iter(rows), {}).get(column)
    first = first[0] if isinstance(first, list) and first else first
    if isinstance(first, bytes) or (isinstance(first, dict) and first.get("bytes") is not None):
        return rows
    sample = Dataset.from_dict({column: [first]}) if isinstance(rows, IterableDataset) else rows
    root = ""
    if any(is_local(path) and not os.path.isabs(path) for path in media_paths(sample, column)):
        root = find_root(split, data_args)
        settings = {"fn_kwargs": {"column": column, "root": root}, "features": rows.features}
        rows = rows.map(_join_paths, batched=True, **settings)
    if isinstance(rows, IterableDataset):
        return rows
    missing = [
        *dict.fromkeys(path for path in media_paths(rows, column) if is_local(path) and not os.path.exists(path))
    ]
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        message = f"`{data_args.used_columns[0]}` names files that are missing, {len(missing)} in all: {names}."
        message += f" Relative paths start from {root}; `--image_root` names another folder." if root else ""
        if not data_args.skip_bad_rows:
            raise ValueError(message)
        logger.warning(message)
    return rows


def find_root(split: str, data_args: DataArguments) -> str:
    """The folder that relative paths of a split start from: `image_root`, or that of the files that name them."""
    root = data_args.image_root
    if root is None:
        files = load_dataset_builder(
            data_args.dataset, data_args.dataset_config, data_files=data_args.data_files or None
        )
        folders = {os.path.dirname(path) for path in (files.config.data_files or {}).get(split, [])}
        if len(folders) > 1:
            raise ValueError(f"`{split}` is of files in {len(folders)} folders: its relative paths need `image_root`.")
        root = folders.pop() if folders else ""
    elif not os.path.isdir(root):
        raise ValueError(f"`image_root` is {root!r}, which is no folder.")
    return os.path.abspath(root) if is_local(root) else ""


def _join_paths(batch: dict[str, list], column: str, root: str) -> dict[str, list]:
    def join(value: Any) -> Any:
        if isinstance(value, list):
            return [join(part) for part in value]
        return os.path.join(root, value) if isinstance(value, str) and value and is_local(value) else value

    return {column: [join(value) for value in batch[column]]}


def arrange_texts(rows: Dataset, data_args: DataArguments, groups: bool) -> Dataset:
    """Joins the rows of each image. Without `groups`, splits lists of questions, which are asked one by one."""
    columns = [getattr(data_args, name) for name in data_args.used_columns[1:]]
    texts = rows.select_columns([name for name in (*columns, data_args.group_by) if name in rows.column_names])
    if not groups and not isinstance(rows.features.get(data_args.prompt_column), List):
        return rows
    numbered = ({**row, ROW: index} for index, row in enumerate(texts))
    arranged = group_rows(numbered, data_args) if groups else list(_split_all(numbered, data_args))
    places = [row[ROW] for row in arranged]
    if not groups:  # a row may come several times
        rows, places = rows.select(places), list(range(len(places)))
    # The new texts stand beside all rows before the others are left out. So `datasets` copies no images.
    beside: dict[str, list[Any]] = {column: [None] * len(rows) for column in columns}
    for place, row in zip(places, arranged, strict=True):
        for column in columns:
            beside[column][place] = row[column]
    replaced = {*columns, data_args.group_by} - {getattr(data_args, data_args.used_columns[0])}
    images = rows.remove_columns([name for name in rows.column_names if name in replaced])
    return concatenate_datasets([images, Dataset.from_dict(beside)], axis=1).select(places)


def _split_all(rows: Iterable[dict[str, Any]], data_args: DataArguments) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            yield from split_texts(row, data_args)
        except ValueError as error:
            skip_or_raise(row, data_args, error)


def as_source(rows: Dataset | IterableDataset, part: DataArguments, weight: float) -> Source:
    files = part.data_files.get(part.train_split) if isinstance(part.data_files, dict) else part.data_files
    name = part.dataset if files is None else f"{part.dataset} ({str(files)[:100]})"
    if isinstance(rows, Dataset):  # a demo, or a data set that is not streamed: any row can be read at once
        return Source(name, rows.to_iterable_dataset(num_shards=max(1, min(len(rows), 1024))), weight)
    if part.max_train_samples is None:
        return Source(name, rows, weight)
    # The first rows of a data set are not the first rows of each shard.
    return Source(f"{name}, {part.max_train_samples} rows", rows, weight, splittable=False)
