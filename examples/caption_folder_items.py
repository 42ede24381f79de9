"""Images or videos in folders, WebDataset shards and Parquet files: listed once, and each opened when it is needed.

An item is a row of [`ITEM`]: the location of an image or video. Shards are listed from their headers. `datasets` maps
the list from disk, so it may be longer than memory holds.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from PIL import Image
from pyarrow import parquet as pq

from common.files import file_state
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
        "file_name": pa.string(),  # relative to the folder of all inputs; of a shard with the name or row in it
        "path": pa.binary(),  # the file on disk; its name need not be UTF-8
        "shard_size": pa.int64(),  # of a shard, in bytes
        "shard_time": pa.int64(),  # of its last change, in nanoseconds since 1970
        "offset": pa.int64(),  # in a .tar: first byte and number of bytes
        "size": pa.int64(),
        "row_group": pa.int32(),  # in a .parquet: row group, and row in it
        "row": pa.int32(),
        "error": pa.string(),  # the reason, if it is known already that the item cannot be read
    }
)


def list_items(inputs: list[str], media: Media, column: str, left_out: Counter) -> Iterator[dict[str, Any]]:
    """Yields rows of [`ITEM`] for the images or videos in folders and shards; `left_out` counts other files by suffix.

    Files below a folder, and members of a `.tar`, are items by the suffix of their name. In a `.parquet` every row is
    an item; `column` holds images or videos of `datasets`, bytes, paths or URLs. A shard of which a part cannot be
    read gives an item with an `error`, and so does a file that is no regular file, such as a named pipe.
    """
    suffixes = SUFFIXES[media] + SHARDS
    base = os.path.commonpath([os.path.abspath(_folder_of(source)) for source in inputs])
    for source in inputs:
        is_path = os.path.exists(source)  # its name may hold brackets
        found = [source] if is_path else sorted(map(os.path.normpath, glob(source, recursive=True)))
        if not found:
            raise ValueError(f"`inputs`: there is no {source}.")
        folders = {path for path in found if os.path.isdir(path)}
        for top in (path for path in found if folders.isdisjoint(map(str, Path(path).parents))):
            for path in _walk(top, left_out) if top in folders else [top]:
                suffix = Path(path).suffix.lower()
                if suffix in suffixes:
                    yield from _items_of(path, os.path.relpath(path, base), media, column)
                elif top in folders or not is_path:
                    left_out[suffix or "(no suffix)"] += 1
                else:
                    wanted = ", ".join(suffixes)
                    raise ValueError(f"`inputs` must be folders or files of {wanted}, but {path} is neither.")


def _folder_of(source: str) -> str:
    """The folder that an input names, or that holds the file or the pattern."""
    if os.path.isdir(source):
        return source
    parts = Path(source).parent.parts
    return str(Path(*parts if os.path.exists(source) else takewhile(lambda part: not has_magic(part), parts)))


def _walk(folder: str, left_out: Counter) -> Iterator[str]:
    """All files below a folder: its own in the order of their names, then those of each folder in it."""

    def stop(error: OSError) -> None:
        raise ValueError(f"`inputs`: {error.filename} cannot be listed: {error}") from error

    for parent, folders, files in os.walk(folder, onerror=stop):
        folders.sort()
        left_out.update("links to folders" for name in folders if os.path.islink(os.path.join(parent, name)))
        yield from (os.path.join(parent, name) for name in sorted(files))


def _items_of(path: str, name: str, media: Media, column: str) -> Iterator[dict[str, Any]]:
    suffix = Path(path).suffix.lower()
    if os.path.exists(path) and not os.path.isfile(path):  # opening a named pipe would wait for a writer
        items = [{"file_name": name, "error": f"`inputs`: {path!r} is no regular file."}]
    elif suffix == ".tar":
        items = _tar_items(path, name, media)
    elif suffix == ".parquet":
        items = _parquet_items(path, name, column)
    else:
        items = [{"file_name": name}]
    common = dict.fromkeys(ITEM.names) | {"path": os.fsencode(os.path.abspath(path))}
    if suffix in SHARDS:
        common["shard_size"], common["shard_time"] = file_state(path) or (None, None)
    for item in items:
        yield {**common, **item, "file_name": os.fsencode(item["file_name"]).decode(errors="backslashreplace")}


def _tar_items(path: str, name: str, media: Media) -> Iterator[dict[str, Any]]:
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep all of them in memory
                if member.isdir() or Path(member.name).suffix.lower() not in SUFFIXES[media]:
                    continue
                error = None if member.isreg() else f"{path}/{member.name}: a link in a .tar is not followed."
                yield {
                    "file_name": f"{name}/{member.name}",
                    "offset": member.offset_data,
                    "size": member.size,
                    "error": error,
                }
            tar.fileobj.seek(tar.offset)  # tarfile takes any broken header for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no header at byte {tar.offset} and no end; the rest is lost")
    except (tarfile.TarError, OSError) as error:
        yield {"file_name": name, "error": f"`inputs`: {path!r} cannot be read: {error}"}


def _parquet_items(path: str, name: str, column: str) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if sum(sizes) != file.metadata.num_rows:  # a damaged number could stand for any number of items
                raise OSError(f"its row groups have {sum(sizes)} rows, but it has {file.metadata.num_rows}")
    except (OSError, pa.ArrowException) as error:
        yield {"file_name": name, "error": f"`inputs`: {path!r} cannot be read: {error}"}
        return
    if column not in schema.names:
        raise ValueError(f"`column` is {column!r}, but {path} has {schema.names}.")
    dtype = schema.field(column).type
    if dtype not in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string()) and not pa.types.is_struct(dtype):
        raise ValueError(f"`column` {column!r} of {path} must hold bytes, paths or `datasets`' images, not {dtype}.")
    index = 0
    for group, size in enumerate(sizes):
        for row in range(size):
            yield {"file_name": f"{name}/{index}", "row_group": group, "row": row}
            index += 1


def check_shards(items: Dataset) -> None:
    """Refuses shards that were replaced since they were listed: the positions of their items may be others now."""
    shards: set[tuple[bytes, int, int]] = set()
    for batch in items.select_columns(["path", "shard_size", "shard_time"]).iter(batch_size=10_000):
        shards.update(row for row in zip(*batch.values(), strict=True) if row[1] is not None)
    changed = [os.fsdecode(path) for path, *state in shards if file_state(path) not in (state, None)]
    if changed:
        names = ", ".join(sorted(changed))
        raise ValueError(f"`inputs`: {names} changed since the items were listed. Name another `output_dir`.")


def read_item(
    item: dict[str, Any], media: Media, column: str, frames: dict[str, float], max_pixels: int
) -> tuple[Image.Image | list[Image.Image] | None, dict[str, Any]]:
    """Opens an item's image, or frames of its video, in RGB; None if it is unreadable or too large.

    With it comes what is kept beside its answer: the `"error"`, if there is one; and as `"source"` path, size and time
    of change of a file that holds this item alone, for [`is_current`].
    """
    details: dict[str, Any] = {}
    try:
        if item["error"] is not None:
            raise ValueError(item["error"])
        source = _source(item, column)
        path = source["path"] if isinstance(source, dict) and source.get("bytes") is None else source
        if isinstance(path, str) and "://" not in path:
            details["source"] = [path, *(file_state(path) or (None, None))]
        if media == "image":
            return load_rgb_image(source, max_pixels=max_pixels), details
        return load_rgb_frames(source, **frames, max_pixels=max_pixels), details
    # An IndexError comes from a row group with fewer rows than were listed.
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        message = str(error) if item["file_name"] in str(error) else f"{item['file_name']}: {error}"
        return None, details | {"error": message.encode(errors="backslashreplace").decode()}  # names need not be UTF-8


def is_current(source: list[Any] | None) -> bool:
    """Whether a file is as it was when [`read_item`] looked for it. A file that is gone counts as unchanged."""
    return source is None or file_state(source[0]) in (source[1:], None)


def _source(item: dict[str, Any], column: str) -> Any:
    """A path, a URL, or bytes with a name, for the processor's loaders."""
    path = os.fsdecode(item["path"])
    if item["size"] is not None:
        with open(path, "rb") as file:
            file.seek(item["offset"])
            data = file.read(item["size"])
        if len(data) < item["size"]:
            raise ValueError(f"only {len(data)} of its {item['size']} bytes are there.")
        return {"bytes": data, "path": item["file_name"]}
    if item["row_group"] is None:
        return path
    value = _row_group(path, item["row_group"], column)[item["row"]].as_py()
    if isinstance(value, bytes):
        return {"bytes": value, "path": item["file_name"]}
    if isinstance(value, str) or (isinstance(value, dict) and (value.get("bytes") or value.get("path"))):
        return value
    raise ValueError(f"`column` must hold an image or a video, but holds {str(value)[:80]}.")


@lru_cache(maxsize=1)
def _row_group(path: str, row_group: int, column: str) -> pa.ChunkedArray:
    """The smallest part of a file that can be read. Its rows are read one after the other."""
    with pq.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(0)
