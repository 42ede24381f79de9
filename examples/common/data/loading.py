"""Training and held-out rows from a demo, a folder, files or the Hub."""

import os
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Video,
    interleave_datasets,
    load_dataset,
)

from common.data.data_arguments import DataArguments
from common.data.mixture import read_mixture, renamed_columns
from common.data.rows import read_row, skip_or_raise
from common.data.streams import CaptionStream, Source, tolerant_reading
from common.demo.demo_datasets import DEMO_DATASETS

WEBDATASET_COLUMNS = ("__key__", "__url__")  # the origin of a row


def load_datasets(data_args: DataArguments, seed: int) -> tuple[Dataset | CaptionStream, Dataset | None]:
    """Loads the training and the held-out split. Images stay encoded until a batch is made of them.

    Without streaming, an epoch of a mixture has every row of each data set at least once. It ends with the data set
    that is largest for its weight, and repeats rows of the others. A stream does not end. `seed` is for mixing and for
    shuffling streams, which the Trainer cannot shuffle. The held-out split has no bad rows. Raises a ValueError if
    arguments contradict each other, or a split or column does not exist; the message names those that do. If a
    held-out row is bad and not to be skipped. If columns of a mixture differ in type.
    """
    check_arguments(data_args)
    with tolerant_reading():
        splits = load_splits(data_args) if data_args.dataset else {}
        train = load_training_split(data_args, splits, seed)
        if not data_args.test_split:
            return train, None
        test = select_split(splits, "test_split", data_args, data_args.max_test_samples)
        if isinstance(test, IterableDataset):  # it is read many times, in several orders
            test = Dataset.from_list(list(test), features=test.features)
    good = []
    for index, row in enumerate(test):
        try:
            read_row(row, data_args)
            good.append(index)
        except ValueError as error:
            skip_or_raise(row, data_args, error)
    return train, test if len(good) == len(test) else test.select(good)


def load_held_out(data_args: DataArguments) -> Dataset:
    """Loads all rows of the held-out split alone. Images stay encoded until a batch is made of them.

    Raises a ValueError if the data set, the split or a column does not exist.
    """
    return select_split(load_splits(data_args), "test_split", data_args, data_args.max_test_samples)


def check_arguments(data_args: DataArguments) -> None:
    """Raises a ValueError if arguments contradict each other, or there is no data set."""
    if data_args.cache_features and data_args.streaming:
        raise ValueError("`cache_features` needs the whole data set, so it cannot be set with `streaming`.")
    views, draws = data_args.cached_views, data_args.draws_views
    if data_args.cache_features and draws and views is None:
        raise ValueError(
            "`cache_features` with `crop_scale`, `horizontal_flip` or the `num_frames` of videos needs "
            "`cached_views`: how many."
        )
    if views is not None and not (data_args.cache_features and draws and views > 0):
        raise ValueError(
            f"`cached_views` is {views}: it must be 1 or more, and goes with `cache_features` and with `crop_scale`, "
            "`horizontal_flip` or the `num_frames` of videos."
        )
    if data_args.streaming and data_args.test_split and data_args.max_test_samples is None:
        raise ValueError("`streaming` needs `max_test_samples`, or an empty `test_split`.")
    if not data_args.dataset and not data_args.mixture:
        raise ValueError(
            "`dataset` is needed: a folder, a name on the Hub, a kind of file with `data_files`, or a demo."
        )
    if not data_args.dataset and data_args.test_split:
        raise ValueError("`mixture` needs a `dataset` with held-out rows, or an empty `test_split`.")


def load_splits(data_args: DataArguments) -> DatasetDict | IterableDatasetDict:
    """All splits of a data set by name.

    Raises a ValueError if there is no such data set, or its files cannot be read.
    """
    if data_args.dataset in DEMO_DATASETS:
        return DEMO_DATASETS[data_args.dataset]()
    try:
        return load_dataset(
            data_args.dataset,
            data_args.dataset_config,
            data_files=data_args.data_files or None,
            streaming=data_args.streaming,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`dataset` is {data_args.dataset!r}, which is no folder, none of {', '.join(DEMO_DATASETS)}, and cannot "
            f"be had from the Hub: {error}"
        ) from error
    except Exception as error:  # builders of `datasets` raise errors of many types
        cause = error.__cause__ or error
        hint = " A metadata.jsonl holds one JSON object a line, in UTF-8." if os.path.isdir(data_args.dataset) else ""
        raise ValueError(
            f"`dataset`: {data_args.dataset!r} cannot be read: {type(cause).__name__}: {cause}.{hint}"
        ) from error


def load_training_split(data_args: DataArguments, splits: Any, seed: int) -> Dataset | CaptionStream:
    """The training split of one data set, or of a mixture."""
    parts = read_mixture(data_args)  # one part without a mixture
    loaded = []
    for _, part in parts:
        rows = splits if part is data_args else load_splits(part)
        rows = select_split(rows, "train_split", part, part.max_train_samples)
        renamed = renamed_columns(part, data_args)
        loaded.append(rows.rename_columns(renamed) if renamed else rows)
    weights = [weight for weight, _ in parts]
    if data_args.streaming:
        sources = [as_source(rows, part, weight) for rows, (weight, part) in zip(loaded, parts, strict=True)]
        return CaptionStream(sources, seed, data_args.shuffle_buffer)
    if len(loaded) == 1:
        return loaded[0]
    probabilities = [weight / sum(weights) for weight in weights]
    try:
        return interleave_datasets(loaded, probabilities, seed, stopping_strategy="all_exhausted")
    except ValueError as error:
        raise ValueError(f"`mixture`: columns of its data sets are of different types: {error}") from error


def select_split(
    splits: Any, argument: str, data_args: DataArguments, max_samples: int | None
) -> Dataset | IterableDataset:
    """The first rows of the split that `argument` names, with the columns that are used; images are not decoded.

    Raises a ValueError if the split or a column does not exist.
    """
    name = getattr(data_args, argument)
    if name not in splits:
        hint = "" if argument == "train_split" else '; --test_split "" trains without held-out images'
        raise ValueError(f"`{argument}` is {name!r}, but the data set has {sorted(splits)}{hint}.")
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
    rows = rows.select_columns([*used.values(), *(column for column in WEBDATASET_COLUMNS if column in columns)])
    if max_samples is None:
        return rows
    return rows.take(max_samples) if isinstance(rows, IterableDataset) else rows.take(min(max_samples, len(rows)))


def as_source(rows: Dataset | IterableDataset, part: DataArguments, weight: float) -> Source:
    files = part.data_files.get(part.train_split) if isinstance(part.data_files, dict) else part.data_files
    name = part.dataset if files is None else f"{part.dataset} ({str(files)[:100]})"
    if isinstance(rows, Dataset):  # a demo, or a data set that is not streamed: any row can be read at once
        return Source(name, rows.to_iterable_dataset(num_shards=max(1, min(len(rows), 1024))), weight)
    if part.max_train_samples is None:
        return Source(name, rows, weight)
    # The first rows of a data set are not the first rows of each shard.
    return Source(f"{name}, {part.max_train_samples} rows", rows, weight, splittable=False)
