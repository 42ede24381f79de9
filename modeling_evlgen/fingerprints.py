"""Identifies what a model was trained on: base models by name, commit and weights; the model of an adapter."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
    flatten_dict,
    has_file,
    logging,
)

from configuration_evlgen import EVLGenConfig

logger = logging.get_logger(__name__)

# The towers by the arguments that name their base models.
TOWERS = {"vision_model": "vision_tower", "text_model": "language_model"}
# The other parts of a model. It may lack the last two.
TRAINED_PARTS = ("ln_vision", "vision_projection", "connector", "language_projection", "temporal", "time_embedding")

# Arguments of `from_pretrained` that say where files are.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "subfolder")
BASE_MODEL = "base_model.json"  # beside an adapter: fields of the model that it was trained on

# Fields of a tower's configuration that do not change what it computes. Names with a leading underscore do not either.
INERT_FIELDS = {"architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config"}
INERT_FIELDS |= {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "initializer_range"}
INERT_FIELDS |= {"bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type"}


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


def identify(argument: str, name_or_path: str | os.PathLike, **hub_arguments: Any) -> dict[str, str | None]:
    """The fields of the configuration that name a base model which has just been loaded.

    Where a branch or tag was named, its commit is found. `argument` is `"vision_model"` or `"text_model"`.
    """
    name, commit = find_name(name_or_path)
    if not os.path.isdir(name_or_path):
        config = _find_file(name_or_path, CONFIG_NAME, hub_arguments)
        commit = extract_commit_hash(config, None) or hub_arguments.get("revision")
    fingerprint = fingerprint_files(name_or_path, **hub_arguments)
    fields = {"name_or_path": name, "revision": commit, "fingerprint": fingerprint}
    return {f"{argument}_{field}": value for field, value in fields.items()}


def fingerprint_files(name_or_path: str | os.PathLike, **hub_arguments: Any) -> str | None:
    """SHA-256 over the SHA-256 sums of weight files in a folder or the Hub's cache; None if there are none."""
    cache = Path(hub_arguments.get("cache_dir") or constants.HF_HUB_CACHE).resolve()
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = _find_file(name_or_path, name, hub_arguments)
        if path is None:
            continue
        paths = [path]
        if name.endswith(".json"):
            shards = sorted(set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [_find_file(name_or_path, shard, hub_arguments) for shard in shards]
        return hashlib.sha256("\n".join(_hash_file(path, cache) for path in paths).encode()).hexdigest()
    return None


def _find_file(name_or_path: str | os.PathLike, file_name: str, hub: Mapping[str, Any]) -> str | None:
    """A file in a folder or in the Hub's cache. The base model was loaded just now, so its files are on disk."""
    file_name = os.path.join(hub.get("subfolder", ""), file_name)
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, file_name)
        return path if os.path.isfile(path) else None
    path = try_to_load_from_cache(str(name_or_path), file_name, hub.get("cache_dir"), hub.get("revision"))
    return path if isinstance(path, str) else None


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
    for. One CPU core hashes 1 to 2 GB each second. None if a tensor is on the meta device.
    """
    if any(tensor.is_meta for tensor in state_dict.values()):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        plain = tensor.detach()
        plain = plain.dequantize() if hasattr(plain, "__tensor_flatten__") else plain  # it wraps other tensors
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


def choose_towers(
    model: PreTrainedModel, requested: str | None, weights: Mapping[str, torch.Tensor] | None = None
) -> str:
    """Decides whether a checkpoint holds the towers: `"include"` or `"reference"`; see `save_pretrained`.

    `weights` are all weights of the model, if it holds only a share of them itself, as under FSDP.
    """
    if requested not in (None, "include", "reference"):
        raise ValueError(f'`towers` must be "include" or "reference", but is {requested!r}.')
    names = {tower: getattr(model.config, f"{argument}_name_or_path") for argument, tower in TOWERS.items()}
    on_hub = all(is_on_hub(name) for name in names.values())
    chosen = requested or model.config.towers or ("reference" if on_hub else "include")
    if chosen == "reference":
        weights = model.state_dict() if weights is None else weights
        problems = [problem for tower, name in names.items() if (problem := _problem(model, tower, name, weights))]
        if problems and requested == "reference":
            raise ValueError(f'`towers` cannot be "reference": {"; ".join(problems)}.')
        if problems:
            logger.warning(f"The checkpoint holds its towers: {'; '.join(problems)}.")
            chosen = "include"
    if chosen == "include" and getattr(model.language_model, "hf_quantizer", None) is not None:
        raise ValueError(
            '`towers` cannot be "include" with a quantised language model. A checkpoint that only names its towers, '
            'saved with `towers="reference"`, can be loaded quantised, trained and saved; so can an adapter.'
        )
    return chosen


def _problem(model: PreTrainedModel, tower: str, name: str | None, weights: Mapping[str, torch.Tensor]) -> str | None:
    """The reason why a tower cannot be named instead of saved, if there is one."""
    if name is None:
        return f"{tower} has no name"
    before, prefix = model.tower_hashes.get(tower), f"{tower}."
    if before is None:  # a tower from a checkpoint, given as a model, offloaded, or loaded with other fields
        return f"{tower} cannot be compared with {name!r}"
    now = hash_weights({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    return None if now == before else f"{tower} differs from {name!r}"


def find_adapter(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[str | os.PathLike, str | None]:
    """Returns the name of the model to load, and that of the adapter to put on it, or None.

    In the `kwargs` of `from_pretrained`, `revision` and `subfolder` of an adapter move into `adapter_kwargs`.
    """
    adapter_kwargs = dict(kwargs.get("adapter_kwargs") or {})
    adapter = adapter_kwargs.get("_adapter_model_path")  # the key by which AutoModel tells what it has found already
    if adapter is not None:
        return name_or_path, adapter
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    try:
        adapter, base, _ = maybe_load_adapters(name_or_path, hub, **adapter_kwargs)
        os.fspath(base)
    except (LookupError, TypeError, ValueError) as error:
        where = f"{ADAPTER_CONFIG_NAME} of {str(name_or_path)!r}"
        raise ValueError(f"{where} must name a model as `base_model_name_or_path`: {error!r}") from error
    if adapter is None:
        return name_or_path, None
    kwargs["adapter_kwargs"] = {**adapter_kwargs, "_adapter_model_path": adapter}
    if base != name_or_path:
        kwargs["adapter_kwargs"] |= {name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs}
        base = _find_base(base, adapter)
    return base, adapter


def _find_base(base: str, adapter: str | os.PathLike) -> str:
    """The folder or name of an adapter's model. A relative path may start in any folder above the adapter."""
    if os.path.isdir(base) or not os.path.isdir(adapter):
        return base
    folder = Path(adapter).resolve()
    for parent in (folder, *folder.parents):
        if (parent / base / CONFIG_NAME).is_file():
            return str(parent / base)
    if not is_on_hub(base):
        raise ValueError(
            f"The adapter in {adapter} is for the model in {base!r}, which is not there. Write where it is as "
            f"`base_model_name_or_path` into {Path(adapter, ADAPTER_CONFIG_NAME)}."
        )
    return base


def save_base(config: EVLGenConfig, folder: str | os.PathLike) -> None:
    """Writes a description of the model that an adapter was trained on into the adapter's folder."""
    Path(folder, BASE_MODEL).write_text(json.dumps(_describe(config), indent=2) + "\n", encoding="utf-8")


def check_base(config: EVLGenConfig, adapter: str | os.PathLike, kwargs: dict[str, Any]) -> None:
    """Raises a ValueError if a model's configuration is not that of the model that an adapter was trained on.

    The connector's weights may differ, since the adapter has its own.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    if not has_file(adapter, os.path.join(hub.get("subfolder", ""), BASE_MODEL), **hub):
        return  # saved by another script than ours
    path = cached_file(adapter, BASE_MODEL, **hub)
    wanted, found = json.loads(Path(path).read_text(encoding="utf-8")), _describe(config)
    # A fingerprint that either side lacks proves nothing.
    changed = [
        f"`{name}` is {found[name]!r}, not {value!r}"
        for name, value in wanted.items()
        if name in found and None not in (value, found[name]) and found[name] != value
    ]
    if changed:
        raise ValueError(
            f"The adapter {str(adapter)!r} was trained on another model than {config.name_or_path!r}: "
            f"{'; '.join(changed)}. Write the right one as `base_model_name_or_path` into the adapter's "
            f"{ADAPTER_CONFIG_NAME}."
        )


def _describe(config: EVLGenConfig) -> dict[str, Any]:
    """The fields by which models are compared, as JSON holds them."""
    connector = config.connector_config
    names = [f"{argument}_fingerprint" for argument in TOWERS]
    names += ["temporal_contextualizer", "temporal_frame_positions", "video_mode"]
    description = {name: getattr(config, name) for name in names} | {"connector": connector.model_type}
    description |= {f"connector_config.{name}": getattr(connector, name) for name in sorted(connector.field_names())}
    return json.loads(json.dumps(description))
