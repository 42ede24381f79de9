"""Replaces files as a whole, so that a kill leaves the old or the new one; keeps other runs out of a folder.

Notices files of a data set that were replaced.
"""

import hashlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from filelock import FileLock, Timeout

LOCK_SECONDS = 5.0  # to wait for a folder: the system needs a moment to release that of a killed run
SAMPLES, SAMPLE_BYTES = 100, 1_000_000  # rows of a data set that are read to compare it, and bytes of each file


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


def is_local(path: str) -> bool:
    """Whether a name in a column of images or videos is a path on this machine, not a URL or a base64 string."""
    return "://" not in path and not path.startswith("data:")


def media_paths(rows: Dataset, column: str) -> Iterator[str]:
    """Paths and URLs in a column of images or videos: alone, in lists, or beside the bytes of an `Image` column."""
    flat = rows.select_columns(column).flatten()  # else a batch would also read the bytes beside paths
    for name in {column, f"{column}.path"} & {*flat.column_names}:
        for batch in flat.select_columns(name).with_format("arrow").iter(batch_size=10_000):
            values = batch[name]
            while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                values = pc.list_flatten(values)
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "path")
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                yield from filter(None, values.to_pylist())


def media_checksum(rows: Dataset, column: str) -> str:
    """Covers the sizes of all files, and the content of [`SAMPLES`] rows. Names may change."""
    digest = hashlib.sha256()
    for path in media_paths(rows, column):
        digest.update(repr((file_state(path) or [None])[0]).encode())
    sample = rows.select_columns(column).select(range(0, len(rows), len(rows) // SAMPLES + 1))
    for batch in sample.with_format("arrow").iter(batch_size=1):
        digest.update(_read_start(batch[column][0].as_py()))
    return digest.hexdigest()


def _read_start(medium: Any) -> bytes:
    if isinstance(medium, list):
        return b"".join(map(_read_start, medium))
    if isinstance(medium, dict):  # of an `Image` or `Video` column
        medium = medium["path"] if medium.get("bytes") is None else medium["bytes"]
    if isinstance(medium, str) and os.path.isfile(medium):
        with open(medium, "rb") as file:
            return file.read(SAMPLE_BYTES)
    return medium[:SAMPLE_BYTES] if isinstance(medium, bytes) else b""  # nothing of a URL


def make_output_folder(folder: Path) -> None:
    """All processes of a run call it. Refuses a folder that cannot be written to, or that they do not share."""
    is_main = PartialState().is_main_process
    try:
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="_") if is_main else nullcontext() as file:
            [name] = broadcast_object_list([file and Path(file.name).name])  # a new name, which no disk has cached
            seen = gather_object([(folder / name).exists()])
    except OSError as error:
        raise ValueError(f"`output_dir`: {folder} cannot be written to: {error}") from error
    if not all(seen):
        raise ValueError(
            f"`output_dir`: {folder} must be one folder for all processes, but {seen.count(False)} of {len(seen)} see "
            "another one. Machines with disks of their own need a folder that they share."
        )


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Locks an existing folder against other runs while open. The lock ends with the process, even if it is killed.

    Raises a ValueError if another run has locked it. The message names that run.
    """
    run_path = folder / "_run.json"  # the Trainer does not push files that start with "_" to the Hub
    lock = FileLock(folder / "_run.lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        run = json.loads(run_path.read_text(encoding="utf-8")) if run_path.exists() else {}
        other = f": process {run['pid']} on {run['host']}, started {run['started']}: {run['command']}" if run else ""
        message = f"`output_dir`: another run writes to {folder}{other}. Wait for it, or name another folder."
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
