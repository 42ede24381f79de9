"""Several data sets in one, mixed by weight."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common.data.data_arguments import DataArguments

COLUMN_ARGUMENTS = ("image_column", "video_column", "caption_column", "prompt_column", "messages_column")
DATASET_ARGUMENTS = ("dataset", "data_files", "dataset_config", "train_split", "streaming", "max_train_samples")


def read_mixture(data_args: DataArguments) -> list[tuple[float, DataArguments]]:
    """The weight and the arguments of each data set to train on: those of `mixture`, or the single one of `dataset`.

    Raises a ValueError if `mixture` is no list of data sets with weights, or an entry has other keys than a weight,
    its data set's location, columns, `streaming` and `max_train_samples`.
    """
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


def renamed_columns(part: DataArguments, data_args: DataArguments) -> dict[str, str]:
    """Columns whose name in one data set differs from their name in the mixture: old name to new name."""
    names = {getattr(part, column): getattr(data_args, column) for column in data_args.used_columns}
    return {old: new for old, new in names.items() if old != new}


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
        raise ValueError(
            f"`mixture`: {shown} is to be streamed, which takes `--streaming true` for the whole mixture."
        )
    for column in COLUMN_ARGUMENTS:
        if bool(entry.get(column, getattr(data_args, column))) != bool(getattr(data_args, column)):
            raise ValueError(
                f"`mixture`: {shown} sets `{column}`, but the mixture has it at {getattr(data_args, column)!r}."
            )
    # Files and configuration of the held-out data set are not an entry's.
    fields = {"data_files": None, "dataset_config": None, **entry}
    fields.pop("weight")
    return float(weight), replace(data_args, mixture=None, **fields)
