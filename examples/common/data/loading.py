"""Images with captions, from the demo, a folder, files or the Hub."""

from collections.abc import Callable
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
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image as PILImage
from transformers.utils import logging

from common.data.data_arguments import DataArguments
from common.data.mixture import read_mixture, renamed_columns
from common.data.streams import CaptionStream, Source
from common.demo.scenes import DEMO_DATASETS, load_demo_dataset
from processing_evlgen.conversations import check_conversation
from processing_evlgen.images import load_rgb_image
from processing_evlgen.videos import load_rgb_frames

logger = logging.get_logger(__name__)

WEBDATASET_NAMES = ("__key__", "__url__")  # columns that tell where a row is from


def _or_none(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode_or_give_none(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception:  # whatever text, JSON, NumPy and others raise
            return None

    return decode_or_give_none


# `datasets` decodes all members of a WebDataset sample, also those that no column is made of, and a single one that
# cannot be decoded would end the stream. As None it is a bad row, if it is needed at all.
WebDataset.DECODERS.update({suffix: _or_none(decode) for suffix, decode in WebDataset.DECODERS.items()})


def load_captions(arguments: DataArguments, seed: int) -> tuple[Dataset | CaptionStream, Dataset | None]:
    """Loads the training and the held-out split. Images stay encoded until a batch is made of them.

    A mixture of map-style data sets has every row of each at least once in an epoch: it ends with the data set that
    is the largest for its weight, and takes rows of the others repeatedly. A stream does not end.

    Args:
        arguments: Which data sets, splits and columns.
        seed: For shuffling a stream, in which the Trainer cannot draw, and for mixing.

    Returns:
        The training split, and the held-out split or None, without bad rows.

    Raises:
        ValueError: If a split or a column does not exist; the message names those that do. If a held-out row is bad
            and not to be skipped. If the columns of a map-style mixture are of different types.
    """
    if arguments.streaming and arguments.cache_features:
        raise ValueError("`cache_features` needs the whole data set, so it cannot be set with `streaming`.")
    augmented = bool(arguments.crop_scale or arguments.horizontal_flip)
    views = arguments.cached_views
    if arguments.cache_features and augmented and views is None:
        raise ValueError("`cache_features` with `crop_scale` or `horizontal_flip` needs `cached_views`: how many.")
    if views is not None and not (arguments.cache_features and augmented and views > 0):
        raise ValueError(
            f"`cached_views` is {views}: it must be 1 or more, and goes with `cache_features` and with `crop_scale` "
            "or `horizontal_flip`."
        )
    if arguments.cache_features and arguments.video_column:
        raise ValueError("`cache_features` keeps views of an image, so it cannot be set for videos.")
    if arguments.streaming and arguments.test_split and arguments.max_test_samples is None:
        raise ValueError("`streaming` needs `max_test_samples`, or an empty `test_split`.")
    if not arguments.dataset and not arguments.mixture:
        raise ValueError(
            "`dataset` is needed: a folder, a name on the Hub, a kind of file with `data_files`, or a demo."
        )
    if not arguments.dataset and arguments.test_split:
        raise ValueError("`mixture` needs a `dataset` with held-out rows, or an empty `test_split`.")
    splits = _load_splits(arguments) if arguments.dataset else {}
    train = _load_train(arguments, splits, seed)
    if not arguments.test_split:
        return train, None
    test = _take(splits, "test_split", arguments, arguments.max_test_samples)
    if isinstance(test, IterableDataset):  # it is read again and again, and in another order
        test = Dataset.from_list(list(test), features=test.features)
    return train, _drop_bad(test, arguments)


def load_held_out(arguments: DataArguments) -> Dataset:
    """Loads the held-out split alone, with all its rows. Images stay encoded until a batch is made of them.

    Args:
        arguments: Which data set, split and columns.

    Raises:
        ValueError: If the data set, the split or a column does not exist.
    """
    return _take(_load_splits(arguments), "test_split", arguments, arguments.max_test_samples)


def _load_train(arguments: DataArguments, splits: Any, seed: int) -> Dataset | CaptionStream:
    parts = read_mixture(arguments)
    weights = [weight for weight, _ in parts]
    loaded = []
    for _, part in parts:
        own = splits if part is arguments else _load_splits(part)
        rows = _take(own, "train_split", part, part.max_train_samples)
        renamed = renamed_columns(part, arguments)
        loaded.append(rows.rename_columns(renamed) if renamed else rows)
    if arguments.streaming:
        sources = [_source(rows, part, weight) for rows, (weight, part) in zip(loaded, parts, strict=True)]
        return CaptionStream(sources, seed, arguments.shuffle_buffer)
    if len(loaded) == 1:
        return loaded[0]
    shares = [weight / sum(weights) for weight in weights]
    try:
        return interleave_datasets(loaded, shares, seed, stopping_strategy="all_exhausted")
    except ValueError as error:
        raise ValueError(f"`mixture`: columns of its data sets are of different types: {error}") from error


def _source(rows: Dataset | IterableDataset, part: DataArguments, weight: float) -> Source:
    files = part.data_files.get(part.train_split) if isinstance(part.data_files, dict) else part.data_files
    name = part.dataset if files is None else f"{part.dataset} ({str(files)[:100]})"
    if isinstance(rows, Dataset):  # of a demo, or not to be streamed: any row can be read at once
        return Source(name, rows.to_iterable_dataset(num_shards=max(1, min(len(rows), 1024))), weight)
    if part.max_train_samples is None:
        return Source(name, rows, weight)
    # The first rows are not the first ones of each shard.
    return Source(f"{name}, {part.max_train_samples} rows", rows, weight, splittable=False)


def _load_splits(arguments: DataArguments) -> DatasetDict | IterableDatasetDict:
    if arguments.dataset in DEMO_DATASETS:
        return load_demo_dataset(arguments.dataset)
    try:
        return load_dataset(
            arguments.dataset,
            arguments.dataset_config,
            data_files=arguments.data_files or None,
            streaming=arguments.streaming,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`dataset` is {arguments.dataset!r}, which is no folder, none of {', '.join(DEMO_DATASETS)}, and cannot "
            f"be had from the Hub: {error}"
        ) from error


def _take(splits: Any, argument: str, arguments: DataArguments, limit: int | None) -> Dataset | IterableDataset:
    name = getattr(arguments, argument)
    if name not in splits:
        hint = "" if argument == "train_split" else '; --test_split "" trains without held-out images'
        raise ValueError(f"`{argument}` is {name!r}, but the data set has {sorted(splits)}{hint}.")
    dataset = splits[name]
    columns = dataset.column_names or list(next(iter(dataset)))  # a stream may not know its columns
    for column_argument in arguments.used_columns:
        column = getattr(arguments, column_argument)
        if column not in columns:
            raise ValueError(f"`{column_argument}` is {column!r}, but the data set has {columns}.")
    visual_column = getattr(arguments, arguments.used_columns[0])
    feature = None if dataset.features is None else dataset.features[visual_column]
    if isinstance(feature, Image | Video):
        dataset = dataset.cast_column(visual_column, type(feature)(decode=False))
    used = [getattr(arguments, name) for name in arguments.used_columns]
    dataset = dataset.select_columns([*used, *(name for name in WEBDATASET_NAMES if name in columns)])
    if limit is None:
        return dataset
    return (
        dataset.take(limit)
        if isinstance(dataset, IterableDataset)
        else dataset.select(range(min(limit, len(dataset))))
    )


def _drop_bad(dataset: Dataset, arguments: DataArguments) -> Dataset:
    rows = [index for index, row in enumerate(dataset) if read_row(row, arguments) is not None]
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def read_row(
    row: dict[str, Any],
    arguments: DataArguments,
    frame_sampling: str = "uniform",
    bad_rows: list[dict[str, Any]] | None = None,
) -> PILImage.Image | list[PILImage.Image] | None:
    """Opens the image or the video of a row, and sees that it has a caption.

    Args:
        row: A row of a data set.
        arguments: Names the columns, and says what to do with bad rows.
        frame_sampling: How to choose a video's frames, see [`sample_frames`].
        bad_rows: Where a row that is skipped is put down, if anywhere.

    Returns:
        The image or images, or the video's frames, in RGB; None if the row is bad and to be skipped, which is
        logged.

    Raises:
        ValueError: If the image cannot be read or there is no caption, and bad rows are not to be skipped.
    """
    try:
        _check_text(row, arguments)
        return open_media(row, arguments, frame_sampling)
    except ValueError as error:
        refuse_row(row, arguments, error, bad_rows)
        return None


def open_media(
    row: dict[str, Any], arguments: DataArguments, frame_sampling: str = "uniform"
) -> PILImage.Image | list[PILImage.Image]:
    """Opens the image, the images or the video's frames of a row, in RGB; see [`read_row`].

    Raises:
        ValueError: If it cannot be read.
    """
    if arguments.video_column:
        return load_rgb_frames(row[arguments.video_column], arguments.num_frames, frame_sampling)
    images = row[arguments.image_column]
    return [load_rgb_image(p) for p in images] if isinstance(images, list) else load_rgb_image(images)


def _check_text(row: dict[str, Any], arguments: DataArguments) -> None:
    """Sees that there is something to say about the image or video, and in a conversation a place for it."""
    if arguments.messages_column:
        num_images, num_videos = (0, 1) if arguments.video_column else (count_images(row[arguments.image_column]), 0)
        if num_images == num_videos == 0:
            raise ValueError(f"`{arguments.image_column}` holds no image.")
        check_conversation(row[arguments.messages_column], num_images, num_videos)
        return
    captions = row[arguments.caption_column]
    if not captions or not all(isinstance(c, str) and c.strip() for c in true_captions(row, arguments)):
        raise ValueError(f"`{arguments.caption_column}` must hold a caption, but is {captions!r}.")
    if arguments.prompt_column and not isinstance(row[arguments.prompt_column], str):
        raise ValueError(f"`{arguments.prompt_column}` must hold a text, but is {row[arguments.prompt_column]!r}.")


def count_images(images: Any) -> int:
    """How many images a row's cell holds: one, or a list."""
    return len(images) if isinstance(images, list) else 1


def refuse_row(
    row: dict[str, Any], arguments: DataArguments, error: ValueError, bad_rows: list[dict[str, Any]] | None
) -> None:
    """Logs a bad row that is to be skipped, and puts it down in `bad_rows`.

    Raises:
        ValueError: If bad rows are not to be skipped; the message names the row.
    """
    name = f"the row with the caption {caption_of(row, arguments)!r}"
    if row.get("__key__"):
        name += f" ({row['__key__']} in {row['__url__']})"
    if not arguments.skip_bad_rows:
        raise ValueError(f"{name}: {error} (`--skip_bad_rows true` goes on without it.)") from error
    logger.warning(f"Skipped {name}: {error}")
    if bad_rows is not None:
        bad_rows.append({"row": name, "error": str(error)})


def caption_of(row: dict[str, Any], arguments: DataArguments) -> str:
    """The beginning of what a row says, by which it can be found, whether it is right or not."""
    return str(row[arguments.messages_column or arguments.caption_column])[:80]


def true_captions(row: dict[str, Any], arguments: DataArguments) -> list[str]:
    """The captions of a row, of which there may be one or several; the assistant's last words of a conversation."""
    if arguments.messages_column:
        content = row[arguments.messages_column][-1]["content"]
        return [content if isinstance(content, str) else "".join(part["text"] or "" for part in content)]
    captions = row[arguments.caption_column]
    return [captions] if isinstance(captions, str) else list(captions)
