"""The files behind a column of images or videos, and what a resumed run compares of them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from common.files import file_state

SAMPLES, SAMPLE_BYTES = 100, 1_000_000  # of images or videos, and of each of them


def media_paths(rows: Dataset, column: str) -> Iterator[str]:
    """Paths and URLs in a column, in order: alone, in lists, or beside the bytes of an `Image` column."""
    flat = rows.select_columns(column).flatten()  # else a batch would also read the bytes beside paths
    name = column if column in flat.column_names else f"{column}.path"
    if name not in flat.column_names:
        return
    for batch in flat.select_columns(name).with_format("arrow").iter(batch_size=10_000):
        values = batch[name]
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = pc.list_flatten(values)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "path")
        if not pa.types.is_string(values.type):
            return
        yield from filter(None, values.to_pylist())


def media_checksum(rows: Dataset, column: str) -> str:
    """Covers the sizes of all files, and the content of [`SAMPLES`] rows at equal distances. They may be moved."""
    digest = hashlib.sha256()
    for path in media_paths(rows, column):
        size, _ = file_state(path) or (None, None)
        digest.update(repr(size).encode())
    media = rows.select_columns(column).select(range(0, len(rows), len(rows) // SAMPLES + 1))
    for batch in media.with_format("arrow").iter(batch_size=1):
        _update(digest, batch[column][0].as_py())
    return digest.hexdigest()


def _update(digest: Any, medium: Any) -> None:
    if isinstance(medium, list):
        for part in medium:
            _update(digest, part)
        return
    if isinstance(medium, dict):  # of an `Image` or `Video` column
        medium = medium.get("path") if medium.get("bytes") is None else medium["bytes"]
    if isinstance(medium, bytes):
        digest.update(medium[:SAMPLE_BYTES])
    elif isinstance(medium, str) and file_state(medium) and Path(medium).is_file():
        with open(medium, "rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
