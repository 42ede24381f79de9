"""Several data sets in one, by weights."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common.data.data_arguments import DataArguments

COLUMNS = ("image_column", "video_column", "caption_column", "prompt_column", "messages_column")
ALONE = ("dataset", "data_files", "dataset_config", "train_split", "streaming", "max_train_samples")


def read_mixture(arguments: DataArguments) -> list[tuple[float, DataArguments]]:
    """The data sets to train on: those of `mixture`, or the one that the arguments name.

    Args:
        arguments: What the data sets do not say themselves.

    Returns:
        A weight and the arguments of each.

    Raises:
        ValueError: If `mixture` is no list of data sets with weights, or one names something else than its place,
            its columns, `streaming`, `max_train_samples` and its weight.
    """
    if not arguments.mixture:
        return [(1.0, arguments)]
    entries = arguments.mixture
    if isinstance(entries, str):
        if not Path(entries).is_file():
            raise ValueError(f"`mixture` is {entries!r}, which is no YAML file (nor a list, as JSON).")
        try:
            entries = yaml.safe_load(Path(entries).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`mixture`: {entries} is no YAML: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"`mixture` must be a list of data sets, each with a weight, but is {entries!r}.")
    return [_read_entry(entry, arguments) for entry in entries]


def renamed_columns(part: DataArguments, arguments: DataArguments) -> dict[str, str]:
    """The columns of one data set that are called otherwise in the mixture, and how."""
    names = {getattr(part, column): getattr(arguments, column) for column in arguments.used_columns}
    return {own: shared for own, shared in names.items() if own != shared}


def _read_entry(entry: dict[str, Any], arguments: DataArguments) -> tuple[float, DataArguments]:
    named = json.dumps(entry, ensure_ascii=False)
    unknown = sorted(entry.keys() - {"weight", *ALONE, *COLUMNS})
    if unknown:
        raise ValueError(f"`mixture`: {named} holds unknown names: {', '.join(unknown)}.")
    if not entry.get("dataset"):
        raise ValueError(f"`mixture`: {named} needs a `dataset`.")
    weight = entry.get("weight")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
        raise ValueError(f"`mixture`: {named} needs a `weight` above 0, but has {weight!r}.")
    if entry.get("streaming") and not arguments.streaming:
        raise ValueError(
            f"`mixture`: {named} is to be streamed, which takes `--streaming true` for the whole mixture."
        )
    for column in COLUMNS:
        if bool(entry.get(column, getattr(arguments, column))) != bool(getattr(arguments, column)):
            raise ValueError(
                f"`mixture`: {named} sets `{column}`, but the mixture has it at {getattr(arguments, column)!r}."
            )
    alone = {"data_files": None, "dataset_config": None, **entry}
    alone.pop("weight")
    return float(weight), replace(arguments, mixture=None, **alone)
