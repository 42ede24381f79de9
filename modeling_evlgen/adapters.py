"""Finds adapters that PEFT saved, and the models that they are for."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

from configuration_evlgen import EVLGenConfig

from .fingerprints import TOWERS, is_on_hub

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "subfolder")
BASE_MODEL = "base_model.json"  # beside an adapter: fields of the model that it was trained on


def find_adapter(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[str | os.PathLike, str | None]:
    """Returns the name of the model to load, and that of the adapter to put on it, or None.

    In the `kwargs` of `from_pretrained`, `revision` and `subfolder` of an adapter move into `adapter_kwargs`.

    Raises:
        ValueError: If there is an adapter, but not its model.
    """
    adapter_kwargs = dict(kwargs.get("adapter_kwargs") or {})
    adapter = adapter_kwargs.get("_adapter_model_path")
    if adapter is not None:  # AutoModel has found it already
        return name_or_path, adapter
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    adapter, base, _ = maybe_load_adapters(name_or_path, hub, **adapter_kwargs)
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
    above = [parent / base for parent in (folder, *folder.parents)]
    found = next((path for path in above if (path / CONFIG_NAME).is_file()), None)
    if found is not None:
        return str(found)
    if not is_on_hub(base):
        raise ValueError(
            f"The adapter in {adapter} is for the model in {base}, which is not there. Write where it is as "
            f"`base_model_name_or_path` into {Path(adapter, ADAPTER_CONFIG_NAME)}."
        )
    return base


def save_base(config: EVLGenConfig, folder: str | os.PathLike) -> None:
    """Writes a description of the model that an adapter was trained on into the adapter's folder."""
    Path(folder, BASE_MODEL).write_text(json.dumps(_describe(config), indent=2) + "\n", encoding="utf-8")


def check_base(config: EVLGenConfig, adapter: str | os.PathLike, kwargs: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: If a model's configuration is not that of the model that an adapter was trained on. The connector's
            weights may differ, since the adapter has its own.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    path = cached_file(adapter, BASE_MODEL, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:  # saved by another script than ours
        return
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
    description = {f"{argument}_fingerprint": getattr(config, f"{argument}_fingerprint") for argument in TOWERS}
    description |= {
        name: getattr(config, name) for name in ("temporal_contextualizer", "temporal_frame_positions", "video_mode")
    }
    description["connector"] = connector.model_type
    description |= {f"connector_config.{name}": getattr(connector, name) for name in sorted(connector.field_names())}
    return json.loads(json.dumps(description))
