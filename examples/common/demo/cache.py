"""The folder that holds everything that the demo prepares once: packages, towers and data sets."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import constants


def demo_cache_dir() -> Path:
    """Returns the folder that holds the demo's prepared models and data: `$HF_HOME/evlgen_demo`."""
    return Path(constants.HF_HOME) / "evlgen_demo"


def prepare_once(name: str, write: Callable[[Path], None]) -> Path:
    """Returns the cached folder `name`, and first writes it if it does not exist.

    `write` fills a temporary folder, which takes its final name only when it is complete. An interrupted process
    therefore never leaves half a folder under the final name.

    Args:
        name: Path of the folder below `demo_cache_dir()`.
        write: Called with a path that does not exist yet; must create a folder there. It may put temporary files
            beside that folder.

    Returns:
        The complete folder.
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
