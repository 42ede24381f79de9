"""The folder that holds everything that the demo prepares once: packages, towers and data sets."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import constants


def demo_cache_dir() -> Path:
    """Returns `$HF_HOME/evlgen_demo`."""
    return Path(constants.HF_HOME) / "evlgen_demo"


def prepare_once(name: str, write: Callable[[Path], None]) -> Path:
    """Returns the cached folder `name`, and first writes it if it does not exist.

    `write` gets a path that does not exist yet. It must create a folder there, and may put temporary files beside it.
    The folder takes its final name only when it is complete. So an interrupted process never leaves half a folder.
    """
    folder = demo_cache_dir() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, because os.replace is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        with torch.random.fork_rng():  # a first run starts from the same fresh weights as those after it
            write(partial)
        try:
            os.replace(partial, folder)
        except OSError:
            # A full folder cannot be replaced: another process (say, the next rank) was faster, with the same content.
            if not folder.is_dir():
                raise
    return folder
