"""Files that a kill leaves whole, the old or the new one; and folders that only one run writes to."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_SECONDS = 5.0  # to wait for a folder: a run that was killed keeps it until the system has cleaned up


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


@contextmanager
def only_run_in(folder: Path, argument: str = "output_dir") -> Iterator[None]:
    """While open, no other run can open the same folder. The lock ends with the process, however that ends.

    Args:
        folder: An existing folder.
        argument: The argument that names it, for the message.

    Raises:
        ValueError: If another run has it open; the message names that run.
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
