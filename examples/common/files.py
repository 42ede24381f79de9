"""Files that, whenever a process is killed, are either the old ones or the new ones as a whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text file as a whole."""
    with replacing(path) as partial_path:
        partial_path.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to replace `path` as a whole, once it is written; other processes write elsewhere."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield partial_path
    os.replace(partial_path, path)
