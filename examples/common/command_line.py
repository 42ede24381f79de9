"""Reads the arguments of a script from the command line and from a YAML file."""

import json
from argparse import ArgumentParser
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(*dataclass_types: type, argv: list[str] | None, recipe: Path | None = None) -> tuple[Any, ...]:
    """Reads the YAML file given by `--config`, or `recipe`, and the command line, which overrides it.

    `--fps` overrides the file's `num_frames` as well, and the other way round: only one of them can be given.

    Args:
        dataclass_types: What to fill.
        argv: The command line without the program's name; None for the process's.
        recipe: The YAML file to read if the command line names none, if any.

    Returns:
        One instance of each dataclass.

    Raises a ValueError if the YAML file holds a name that no dataclass has.
    """
    config = ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path, default=recipe, help="YAML file with any of these arguments.")
    path, argv = config.parse_known_args(argv)
    parser = HfArgumentParser(dataclass_types, parents=[config], allow_abbrev=False)
    settings = {}
    if path.config is not None:
        settings = yaml.safe_load(path.config.read_text(encoding="utf-8")) or {}
    known = {field.name for dataclass_type in dataclass_types for field in fields(dataclass_type)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"{path.config} holds unknown arguments: {', '.join(unknown)}.")
    if any(option.partition("=")[0] in ("--num_frames", "--num-frames", "--fps") for option in argv):
        settings = {name: value for name, value in settings.items() if name not in ("num_frames", "fps")}
    parser.set_defaults(**settings)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    parsed = tuple(parsed[: len(dataclass_types)])
    for option in unknown:
        close = get_close_matches(option.lstrip("-"), known, n=1)
        hint = f" Did you mean --{close[0]}?" if close else ""
        raise ValueError(f"Unknown argument {option}.{hint}")
    for arguments in parsed:
        for name, value in vars(arguments).items():  # JSON from the command line
            holds_json = isinstance(value, str) and value.startswith(("{", "["))
            if name in ("connector_config", "data_files", "mixture") and holds_json:
                setattr(arguments, name, json.loads(value))
    return parsed


def check_count(name: str, value: Any, least: int) -> None:
    """Raises a ValueError if an argument is no integer of `least` or more. A YAML file may hold anything."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of {least} or more, but is {value!r}.")
