"""By what a frozen tower is known again: its name and commit, its weight files on disk, its values in memory."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
)

# The towers, by the arguments that name their base models.
TOWERS = {"vision_model": "vision_tower", "text_model": "language_model"}

# Nothing is fetched and nothing is missed: only what was loaded just now is looked for.
_QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
_LOCAL = {"local_files_only": True, "force_download": False, **_QUIET}


class Identity(NamedTuple):
    """By what a base model is found and known again: the fields of the configuration that name it."""

    name_or_path: str | None = None
    revision: str | None = None
    fingerprint: str | None = None


def is_on_hub(name: str | None) -> bool:
    """Whether a base model's name is that of a repository on the Hub. A folder of that name is what is loaded, as in
    transformers."""
    if not name or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def identify(name_or_path: str | os.PathLike | None, **hub_arguments: Any) -> Identity:
    """The identity of a base model that has just been loaded.

    Args:
        name_or_path (`str` or `os.PathLike`, *optional*): What it was loaded by.
        hub_arguments: `revision`, `cache_dir` … of `from_pretrained`.

    Returns:
        [`Identity`]: a folder's absolute path; or a repository's name and the commit that was loaded, whatever branch
        or tag led there. A folder of the Hub's cache is the repository and the commit that it belongs to.
    """
    if not name_or_path:
        return Identity()
    if not os.path.isdir(name_or_path) and not is_on_hub(str(name_or_path)):
        return Identity(str(name_or_path))
    fingerprint = fingerprint_files(name_or_path, **hub_arguments)
    if os.path.isdir(name_or_path):
        folder = os.path.abspath(name_or_path)
        cached = re.fullmatch("models--(.+)/snapshots/([0-9a-f]{40})", os.path.relpath(folder, constants.HF_HUB_CACHE))
        if cached:
            return Identity(cached[1].replace("--", "/"), cached[2], fingerprint)
        return Identity(folder, None, fingerprint)
    config = cached_file(name_or_path, CONFIG_NAME, **{**hub_arguments, **_LOCAL})
    commit = extract_commit_hash(config, None)
    return Identity(str(name_or_path), commit or hub_arguments.get("revision"), fingerprint)


def fingerprint_files(name_or_path: str | os.PathLike, **hub_arguments: Any) -> str | None:
    """SHA-256 over the SHA-256 sums of a base model's weight files.

    The Hub's cache names large files by that sum, so nothing is read for a model from the Hub; a folder's files are.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder, or the name of a repository whose weights are in the cache.
        hub_arguments: `revision`, `cache_dir` … of `from_pretrained`.

    Returns:
        `str` of 64 hexadecimal digits; None if no weight files are found.
    """
    arguments = {**hub_arguments, **_LOCAL}
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


def remember_tower(model: PreTrainedModel, tower: str) -> None:
    """Keeps the hash of a tower, as it is now, in `model.tower_hashes`."""
    model.tower_hashes[tower] = hash_weights(getattr(model, tower).state_dict())
