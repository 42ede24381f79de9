"""Images or videos in folders, WebDataset shards and Parquet files: listed once, and each opened when it is needed.

An item is a row of [`ITEM`]: the location of an image or video. Shards are listed from their headers. `datasets` maps
the list from disk, so it may be longer than memory holds.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from PIL import Image
from pyarrow import parquet as pq

from processing_evlgen.images import load_rgb_image
from processing_evlgen.videos import load_rgb_frames

Media = Literal["image", "video"]
SUFFIXES = {
    "image": (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    "video": (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".webp"),
}
SHARDS = (".tar", ".parquet")
ITEM = pa.schema(
    {
        "file": pa.string(),  # the name: a path, or a shard's path and the name or row in the shard
        "path": pa.binary(),  # the file on disk; its name need not be UTF-8
        "file_size": pa.int64(),  # of the file on disk, in bytes; null if it could not be looked at
        "file_time": pa.int64(),  # of its last change, in nanoseconds since 1970
        "offset": pa.int64(),  # in a .tar: first byte and number of bytes
        "size": pa.int64(),
        "row_group": pa.int32(),  # in a .parquet: row group, and row in it
        "row": pa.int32(),
        "named_path": pa.binary(),  # the file that a row of a .parquet names, if it does
        "named_size": pa.int64(),
        "named_time": pa.int64(),
        "error": pa.string(),  # the reason, if it is known already that the item cannot be read
    }
)
BATCH = 10_000  # items that are looked at together


def list_items(inputs: list[str], media: Media, column: str, left_out: Counter) -> Iterator[dict[str, Any]]:
    """Yields rows of [`ITEM`] for the images or videos in folders and shards; `left_out` counts other files by suffix.

    Files below a folder, and members of a `.tar`, are items by the suffix of their name. In a `.parquet` every row is
    an item; `column` holds images or videos of `datasets`, bytes, paths or URLs. A shard of which a part cannot be
    read gives an item with an `error`, and so does a file that is no regular file, such as a named pipe.
    """
    suffixes = SUFFIXES[media] + SHARDS
    for source in inputs:
        if not os.path.exists(source):
            raise ValueError(f"`inputs`: there is no {source}.")
        is_folder = os.path.isdir(source)
        for path in _walk(source, left_out) if is_folder else [source]:
            suffix = Path(path).suffix.lower()
            if suffix in suffixes:
                yield from _items_of(path, media, column)
            elif is_folder:
                left_out[suffix or "(no suffix)"] += 1
            else:
                raise ValueError(f"`inputs` must be folders or files of {', '.join(suffixes)}, but {path} is neither.")


def _walk(folder: str, left_out: Counter) -> Iterator[str]:
    """All files below a folder: its own in the order of their names, then those of each folder in it."""

    def stop(error: OSError) -> None:
        raise ValueError(f"`inputs`: {error.filename} cannot be listed: {error}") from error

    for parent, folders, files in os.walk(folder, onerror=stop):
        folders.sort()
        left_out.update("links to folders" for name in folders if os.path.islink(os.path.join(parent, name)))
        yield from (os.path.join(parent, name) for name in sorted(files))


def _items_of(path: str, media: Media, column: str) -> Iterator[dict[str, Any]]:
    suffix = Path(path).suffix.lower()
    if os.path.exists(path) and not os.path.isfile(path):  # opening a named pipe would wait for a writer
        items = [{"file": path, "error": f"`inputs`: {path!r} is no regular file."}]
    elif suffix == ".tar":
        items = _tar_items(path, media)
    elif suffix == ".parquet":
        items = _parquet_items(path, column)
    else:
        items = [{"file": path}]
    common = dict.fromkeys(ITEM.names) | {"path": os.fsencode(os.path.abspath(path))}
    common["file_size"], common["file_time"] = _file_state(common["path"])
    for item in items:
        if item.get("named_path"):
            item["named_size"], item["named_time"] = _file_state(item["named_path"])
        yield {**common, **item, "file": os.fsencode(item["file"]).decode(errors="backslashreplace")}


def _file_state(path: bytes) -> tuple[int | None, int | None]:
    """Size and time of the last change, by which a replaced file is noticed; None for a file that is missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the name may be no possible one
        return None, None
    return status.st_size, status.st_mtime_ns


def _tar_items(path: str, media: Media) -> Iterator[dict[str, Any]]:
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep all of them in memory
                if member.isdir() or Path(member.name).suffix.lower() not in SUFFIXES[media]:
                    continue
                name = f"{path}/{member.name}"
                error = None if member.isreg() else f"{name}: a link in a .tar is not followed."
                yield {"file": name, "offset": member.offset_data, "size": member.size, "error": error}
            tar.fileobj.seek(tar.offset)  # tarfile takes any broken header for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no header at byte {tar.offset} and no end; the rest is lost")
    except (tarfile.TarError, OSError) as error:
        yield {"file": path, "error": f"`inputs`: {path!r} cannot be read: {error}"}


def _parquet_items(path: str, column: str) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if sum(sizes) != file.metadata.num_rows:  # a damaged number could stand for any number of items
                raise OSError(f"its row groups have {sum(sizes)} rows, but it has {file.metadata.num_rows}")
    except (OSError, pa.ArrowException) as error:
        yield {"file": path, "error": f"`inputs`: {path!r} cannot be read: {error}"}
        return
    if column not in schema.names:
        raise ValueError(f"`column` is {column!r}, but {path} has {schema.names}.")
    dtype = schema.field(column).type
    if dtype not in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string()) and not pa.types.is_struct(dtype):
        raise ValueError(f"`column` {column!r} of {path} must hold bytes, paths or `datasets`' images, not {dtype}.")
    index = 0
    for group, size in enumerate(sizes):
        named_paths = _named_paths(path, group, column, dtype)
        if len(named_paths) != size:  # it names none, or is damaged
            named_paths = [None] * size
        for row, named_path in enumerate(named_paths):
            yield {"file": f"{path}/{index}", "row_group": group, "row": row, "named_path": named_path}
            index += 1


def _named_paths(path: str, row_group: int, column: str, dtype: pa.DataType) -> list[bytes | None]:
    """The files that the rows of a row group name; empty for a column of bytes, or if it cannot be read."""
    is_struct = pa.types.is_struct(dtype)
    if dtype in (pa.binary(), pa.large_binary()) or (is_struct and dtype.get_field_index("path") < 0):
        return []
    try:
        with pq.ParquetFile(path) as file:  # without the bytes beside the path
            values = file.read_row_group(row_group, columns=[f"{column}.path" if is_struct else column]).column(0)
    except (OSError, pa.ArrowException):
        return []  # each row will have an error of its own
    names = [value.get("path") if isinstance(value, dict) else value for value in values.to_pylist()]
    no_files = ("http://", "https://", "data:")
    return [os.fsencode(name) if name and not name.startswith(no_files) else None for name in names]


def find_changed(items: Dataset) -> dict[int, dict[str, int]]:
    """Finds files that were replaced since they were listed: their new size and time, by the index of the item.

    A file that is gone counts as unchanged. A shard that was replaced is refused, since the positions of its items may
    be others now.
    """
    changed, changed_shards, index = {}, set(), 0
    state_of = lru_cache(maxsize=1)(_file_state)  # the items of a shard are neighbours
    columns = ["path", "file_size", "file_time", "named_path", "named_size", "named_time"]
    for batch in items.select_columns(columns).iter(batch_size=BATCH):
        for path, *state, named_path, named_size, named_time in zip(*(batch[name] for name in columns), strict=True):
            now = state_of(path)
            if now not in (tuple(state), (None, None)):
                if Path(os.fsdecode(path)).suffix.lower() in SHARDS:
                    changed_shards.add(os.fsdecode(path))
                else:
                    changed[index] = dict(zip(("file_size", "file_time"), now, strict=True))
            now = _file_state(named_path) if named_path else (None, None)
            if now not in ((named_size, named_time), (None, None)):
                changed[index] = dict(zip(("named_size", "named_time"), now, strict=True))
            index += 1
    if changed_shards:
        names = ", ".join(sorted(changed_shards))
        raise ValueError(f"`inputs`: {names} changed since the items were listed. Name another `output_dir`.")
    return changed


def update_items(path: Path, partial_path: Path, changed: dict[int, dict[str, int]]) -> None:
    """Copies a list with the present size and time of replaced files."""
    index = 0
    with pa.ipc.open_stream(path) as reader, pa.ipc.new_stream(partial_path, ITEM) as writer:
        for batch in reader:
            rows = batch.to_pylist()
            for row in rows:
                row.update(changed.get(index, {}))
                index += 1
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=ITEM))


def read_item(
    item: dict[str, Any], media: Media, column: str, frames: dict[str, float], max_pixels: int
) -> Image.Image | list[Image.Image]:
    """Opens an item's image, or frames of its video, in RGB. An unreadable or too large one raises a ValueError."""
    if item["error"] is not None:
        raise ValueError(item["error"])
    try:
        source = _source(item, column)
        if media == "image":
            return load_rgb_image(source, max_pixels=max_pixels)
        return load_rgb_frames(source, **frames, max_pixels=max_pixels)
    # An IndexError comes from a row group with fewer rows than were listed.
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        message = str(error)
        raise ValueError(message if item["file"] in message else f"{item['file']}: {message}") from error


def _source(item: dict[str, Any], column: str) -> Any:
    """A path, a URL, or bytes with a name, for the processor's loaders."""
    path = os.fsdecode(item["path"])
    if item["size"] is not None:
        with open(path, "rb") as file:
            file.seek(item["offset"])
            data = file.read(item["size"])
        if len(data) < item["size"]:
            raise ValueError(f"only {len(data)} of its {item['size']} bytes are there.")
        return {"bytes": data, "path": item["file"]}
    if item["row_group"] is None:
        return path
    value = _row_group(path, item["row_group"], column)[item["row"]].as_py()
    if isinstance(value, bytes):
        return {"bytes": value, "path": item["file"]}
    if isinstance(value, str) or (isinstance(value, dict) and (value.get("bytes") or value.get("path"))):
        return value
    raise ValueError(f"`column` must hold an image or a video, but holds {str(value)[:80]}.")


@lru_cache(maxsize=1)
def _row_group(path: str, row_group: int, column: str) -> pa.ChunkedArray:
    """The smallest part of a file that can be read. Its rows are read one after the other."""
    with pq.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(0)
