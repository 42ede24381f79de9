"""By what a frozen tower is known again: its weight files on disk, and its values in memory."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

# The towers, by the arguments that name their base models.
TOWERS = {"vision_model": "vision_tower", "text_model": "language_model"}


def fingerprint_files(name_or_path: str | os.PathLike, **hub_arguments: Any) -> str | None:
    """SHA-256 over the SHA-256 sums of a base model's weight files.

    The Hub's cache names large files by that sum, so nothing is read for a model from the Hub; a folder's files are.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder, or the name of a repository whose weights are in the cache.
        hub_arguments: `revision`, `cache_dir` … of `from_pretrained`.

    Returns:
        `str` of 64 hexadecimal digits; None if no weight files are found.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    arguments = {**hub_arguments, "local_files_only": True, "force_download": False, **quiet}
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = cached_file(name_or_path, name, **arguments)
        if path is None:
            continue
        paths = [path]
        if name.endswith(".json"):
            with open(path, encoding="utf-8") as index:
                shards = sorted(set(json.load(index)["weight_map"].values()))
            paths = [cached_file(name_or_path, shard, **arguments) for shard in shards]
        return hashlib.sha256("\n".join(map(_file_sum, paths)).encode()).hexdigest()
    return None


def _file_sum(path: str) -> str:
    blob = os.path.basename(os.path.realpath(path))
    if re.fullmatch("[0-9a-f]{64}", blob):
        return blob
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """A hash of the values in memory, by which a change of any of them shows; None where there are no values yet."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        if tensor.is_meta:
            return None
        plain = tensor.detach()
        plain = plain.dequantize() if is_traceable_wrapper_subclass(plain) else plain  # torchao's quantised weights
        bits = plain.contiguous().view(torch.uint8) if plain.dtype.itemsize == 1 else plain
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} {torch.hash_tensor(bits).item()}".encode())
    return digest.hexdigest()


def remember_towers(model: PreTrainedModel) -> None:
    """Keeps the hashes of the towers, as they are now, in `model.tower_hashes`."""
    for tower in TOWERS.values():
        model.tower_hashes[tower] = hash_weights(getattr(model, tower).state_dict())
