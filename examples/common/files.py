"""Replaces files as a whole, so that a kill leaves the old or the new one; keeps other runs out of a folder."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_SECONDS = 5.0  # to wait for a folder: the system needs a moment to release that of a killed run


def write_whole(path: Path, text: str) -> None:
    """Writes a text file as a whole."""
    with replacing(path) as partial_path:
        partial_path.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path. The file written there replaces `path` at the end, unless an error occurs."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another one in each process
    try:
        yield partial_path
        os.replace(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)


@contextmanager
def only_run_in(folder: Path, argument: str = "output_dir") -> Iterator[None]:
    """Locks an existing folder against other runs while open. The lock ends with the process, even if it is killed.

    Raises a ValueError if another run has locked it. The message names that run, and `argument` as the folder's.
    """
    run_path = folder / "_run.json"  # the Trainer does not push files that start with "_" to the Hub
    lock = FileLock(folder / "_run.lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        run = json.loads(run_path.read_text(encoding="utf-8")) if run_path.exists() else {}
        other = f": process {run['pid']} on {run['host']}, started {run['started']}: {run['command']}" if run else ""
        message = f"`{argument}`: another run writes to {folder}{other}. Wait for it, or name another folder."
        raise ValueError(message) from None
    try:
        run = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
        write_whole(run_path, json.dumps({**run, "started": datetime.now().isoformat(timespec="seconds")}))
        yield
    finally:
        run_path.unlink(missing_ok=True)
        lock.release()
