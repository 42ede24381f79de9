"""Images or videos in folders, WebDataset shards and Parquet files: listed once, and each read when its turn comes.

An item is a row of [`ITEM`]: where an image or video is, not the image itself. Shards are listed by their headers
alone, and a list on disk is as good as one in memory (`datasets` maps it), so there may be any number of them.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
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
        "file": pa.string(),  # what it is called: a path, or a shard's path and its name or row in there
        "path": pa.binary(),  # the file on disk, whose name need not be UTF-8
        "offset": pa.int64(),  # in a .tar: where it begins, and how long it is, in bytes
        "size": pa.int64(),
        "row_group": pa.int32(),  # in a .parquet: where it is
        "row": pa.int32(),
        "error": pa.string(),  # why it cannot be read, if that is known already
    }
)


def list_items(inputs: list[str], media: Media, column: str, left_out: Counter) -> Iterator[dict[str, Any]]:
    """Finds the images or videos in folders and shards.

    Args:
        inputs: Folders, in which everything below is looked at, in the order of its names; shards; single files.
        media: What to look for, by the suffix of the name. In a `.tar`, every member of such a name is an item; in a
            `.parquet`, every row is.
        column: The column of a `.parquet`: of `datasets`' images or videos, bytes, paths or URLs.
        left_out: Counts the other files in folders, by their suffix.

    Yields:
        Rows of [`ITEM`]. A shard that cannot be read, or only in part, gives one with an `error`.

    Raises:
        ValueError: If an input does not exist or is of another kind, or a `.parquet` lacks the column.
    """
    known = SUFFIXES[media] + SHARDS
    for given in inputs:
        if os.path.isdir(given):
            for path in _walk(given, left_out):
                suffix = Path(path).suffix.lower()
                if suffix in known:
                    yield from _items_of(path, media, column)
                else:
                    left_out[suffix or "(no suffix)"] += 1
        elif not os.path.exists(given):
            raise ValueError(f"`inputs`: there is no {given}.")
        elif Path(given).suffix.lower() in known:
            yield from _items_of(given, media, column)
        else:
            raise ValueError(f"`inputs` must be folders or files of {', '.join(known)}, but {given} is none of these.")


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
    if suffix == ".tar":
        items = _tar_items(path, media)
    elif suffix == ".parquet":
        items = _parquet_items(path, column)
    else:
        items = [{"file": path}]
    for item in items:
        item["file"] = os.fsencode(item["file"]).decode(errors="backslashreplace")
        yield {**dict.fromkeys(ITEM.names), "path": os.fsencode(os.path.abspath(path)), **item}


def _tar_items(path: str, media: Media) -> Iterator[dict[str, Any]]:
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # or it would keep all of them
                if member.isdir() or Path(member.name).suffix.lower() not in SUFFIXES[media]:
                    continue
                name = f"{path}/{member.name}"
                error = None if member.isreg() else f"{name}: a link in a .tar is not followed."
                yield {"file": name, "offset": member.offset_data, "size": member.size, "error": error}
            tar.fileobj.seek(tar.offset)  # tarfile takes anything that is no header for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no header at byte {tar.offset} and no end; what follows is lost")
    except (tarfile.TarError, OSError) as error:
        yield {"file": path, "error": f"`inputs`: {path!r} cannot be read: {error}"}


def _parquet_items(path: str, column: str) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        yield {"file": path, "error": f"`inputs`: {path!r} cannot be read: {error}"}
        return
    if column not in schema.names:
        raise ValueError(f"`column` is {column!r}, but {path} has {schema.names}.")
    kind = schema.field(column).type
    if kind not in (pa.binary(), pa.large_binary(), pa.string(), pa.large_string()) and not pa.types.is_struct(kind):
        raise ValueError(f"`column` {column!r} of {path} must hold bytes, paths or `datasets`' images, not {kind}.")
    index = 0
    for group, size in enumerate(sizes):
        for row in range(size):
            yield {"file": f"{path}/{index}", "row_group": group, "row": row}
            index += 1


def read_item(item: dict[str, Any], media: Media, column: str, num_frames: int) -> Image.Image | list[Image.Image]:
    """Reads an item's image, or the frames of its video, in RGB.

    Args:
        item: A row of [`ITEM`].
        media, column: As in [`list_items`].
        num_frames: Frames to take of a video.

    Raises:
        ValueError: If it cannot be read; the message names it.
        ImportError: If a video needs PyAV, which is not installed.
    """
    if item["error"] is not None:
        raise ValueError(item["error"])
    try:
        source = _source(item, column)
        return load_rgb_image(source) if media == "image" else load_rgb_frames(source, num_frames)
    except (OSError, ValueError, pa.ArrowException) as error:
        message = str(error)
        raise ValueError(message if item["file"] in message else f"{item['file']}: {message}") from error


def _source(item: dict[str, Any], column: str) -> Any:
    """What the processor's loaders take: a path, or bytes with a name."""
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
    """The smallest part of a file that can be read; its rows are asked for one after the other."""
    with pq.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(0)
