"""Identifies a frozen tower: by its name and commit, by its weight files on disk, and by its weights in memory."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
    flatten_dict,
)

# The towers by the arguments that name their base models.
TOWERS = {"vision_model": "vision_tower", "text_model": "language_model"}

# Fields of a tower's configuration that do not change what it computes. Names with a leading underscore do not either.
INERT_FIELDS = {"architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config"}
INERT_FIELDS |= {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "initializer_range"}
INERT_FIELDS |= {"bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type"}

# The base model was loaded just now, so its files are on disk, or it has none of that name.
_QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
_LOCAL = {"local_files_only": True, "force_download": False, **_QUIET}


class Identity(NamedTuple):
    """Names a base model. Each field is one of the configuration's, behind `vision_model_` or `text_model_`."""

    name_or_path: str | None = None
    revision: str | None = None
    fingerprint: str | None = None


def is_on_hub(name: str | None) -> bool:
    """Whether a base model is a repository on the Hub. A folder with that name comes first, as in transformers."""
    if not name or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def find_name(name_or_path: str | os.PathLike | None) -> tuple[str | None, str | None]:
    """The absolute path of a base model's folder; or its repository and, for a snapshot in the cache, its commit."""
    if not name_or_path:
        return None, None
    if not os.path.isdir(name_or_path):
        return str(name_or_path), None
    folder = os.path.abspath(name_or_path)
    cached = re.fullmatch("models--(.+)/snapshots/([0-9a-f]{40})", os.path.relpath(folder, constants.HF_HUB_CACHE))
    return (cached[1].replace("--", "/"), cached[2]) if cached else (folder, None)


def identify(name_or_path: str | os.PathLike, **hub_arguments: Any) -> Identity:
    """The identity of a base model that has just been loaded, with its commit where a branch or tag was named."""
    name, commit = find_name(name_or_path)
    fingerprint = fingerprint_files(name_or_path, **hub_arguments)
    if not os.path.isdir(name_or_path):
        config = cached_file(name_or_path, CONFIG_NAME, **{**hub_arguments, **_LOCAL})
        commit = extract_commit_hash(config, None) or hub_arguments.get("revision")
    return Identity(name, commit, fingerprint)


def fingerprint_files(name_or_path: str | os.PathLike, **hub_arguments: Any) -> str | None:
    """SHA-256 over the SHA-256 sums of a base model's weight files, in 64 hexadecimal digits.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder, or the name of a repository whose weights are in the cache.
        hub_arguments: `revision`, `cache_dir` … of `from_pretrained`.

    Returns:
        `str`, or None if no weight files are found.
    """
    arguments = {**hub_arguments, **_LOCAL}
    cache = Path(hub_arguments.get("cache_dir") or constants.HF_HUB_CACHE).resolve()
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = cached_file(name_or_path, name, **arguments)
        if path is None:
            continue
        paths = [path]
        if name.endswith(".json"):
            with open(path, encoding="utf-8") as index:
                shards = sorted(set(json.load(index)["weight_map"].values()))
            paths = [cached_file(name_or_path, shard, **arguments) for shard in shards]
        return hashlib.sha256("\n".join(_hash_file(path, cache) for path in paths).encode()).hexdigest()
    return None


def _hash_file(path: str, cache: Path) -> str:
    blob = Path(path).resolve()
    # The Hub's cache names large files by their sum, `models--<repository>/blobs/<sum>`, so they need not be read.
    # Anybody can link to a file with such a name from outside the cache.
    if blob.parts[:-3] == cache.parts and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """SHA-256 over the names, dtypes, shapes and bytes of weights in memory.

    The layout in memory and the device do not matter. Quantised weights of torchao count by the values that they stand
    for. One CPU core hashes 1 to 2 GB each second. Threads were no faster on two busy cores.

    Args:
        state_dict: Tensors of any dtype and shape, by their names.

    Returns:
        `str` of 64 hexadecimal digits; None if a tensor is on the meta device.
    """
    if any(tensor.is_meta for tensor in state_dict.values()):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        plain = tensor.detach()
        plain = plain.dequantize() if is_traceable_wrapper_subclass(plain) else plain
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        # NumPy lacks some of torch's dtypes, but not their bytes. A scalar can only be seen as bytes once it is flat.
        digest.update(plain.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def compare_configs(found: PreTrainedConfig, wanted: PreTrainedConfig) -> list[str]:
    """A message for each field in which two configurations of a tower differ and that may change its outputs."""
    # A nested field is named by its path, as in `rope_parameters.rope_theta`.
    found, wanted = (flatten_dict(json.loads(c.to_json_string(use_diff=False))) for c in (found, wanted))
    names = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    inert = {name for name in names for part in name.split(".") if part in INERT_FIELDS or part.startswith("_")}
    return [f"`{name}` is {found.get(name)!r}, not {wanted.get(name)!r}" for name in names if name not in inert]


def remember_tower(model: PreTrainedModel, tower: str) -> None:
    """Stores the hash of a tower's present weights in `model.tower_hashes`."""
    model.tower_hashes[tower] = hash_weights(getattr(model, tower).state_dict())
