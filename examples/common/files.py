"""Replaces files as a whole, so that a kill leaves the old or the new one; keeps other runs out of a folder."""

import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError

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


def file_state(path: str | bytes) -> list[int] | None:
    """Size and time of the last change, by which a replaced file is noticed; None for a file that is missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the name may be no possible one
        return None
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def naming_disk(folder: str | Path) -> Iterator[None]:
    """An error while files are written becomes an OSError that names their folder and the room on its disk.

    torch's writer tells of a full disk as of an unexpected position in a file.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        room = f"Its disk has {shutil.disk_usage(folder).free / 1e9:.2f} GB left; there may be a quota as well."
        raise OSError(f"{folder} cannot be written: {error}. {room}") from error


def check_shared(folder: Path) -> None:
    """Raises a ValueError on all processes of a run if one of them does not see an existing folder of the main one."""
    state = PartialState()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="_") if state.is_main_process else nullcontext() as file:
        [name] = broadcast_object_list([file and Path(file.name).name])  # a new name, which no disk has cached
        seen = gather_object([(folder / name).exists()])
    if not all(seen):
        raise ValueError(
            f"`output_dir`: {folder} must be one folder for all processes, but {seen.count(False)} of {len(seen)} see "
            "another one. Machines with disks of their own need a folder that they share."
        )


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
        with suppress(PermissionError):  # Windows removes no open file
            Path(lock.lock_file).unlink(missing_ok=True)  # a run that waits for it notices, and makes another
        lock.release()
