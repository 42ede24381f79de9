"""What `caption_folder.py` leaves: a table of captions, `.txt` files, and an HTML page to look at."""

import base64
import html
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from caption_folder_items import read_item
from datasets import Dataset
from pyarrow import parquet as pq
from pyarrow.csv import CSVWriter
from tqdm import tqdm

from common.evaluation.answer_folder import ANSWERS, read_lines
from common.evaluation.captions import NUMBERS
from common.files import replacing, write_whole

ROWS = 10_000  # held in memory and written together
MAX_NAMES = 10  # names in a message about many items
CAPTION = pa.schema({"file_name": pa.string(), "caption": pa.string(), "error": pa.string()})
DOUBT = {"least_certain": pa.string(), **dict.fromkeys(NUMBERS, pa.float64())}
FIGURE = '<figure><img src="{image}" alt=""><figcaption>{text}<br><small>{name}</small></figcaption></figure>\n'
PAGE = """<!DOCTYPE html>
<meta charset="utf-8">
<title>Captions</title>
<style>
body {{ font-family: sans-serif; display: flex; flex-wrap: wrap; gap: 1rem }}
figure {{ margin: 0; width: 256px; overflow-wrap: anywhere }}
small {{ color: gray }}
</style>
{figures}"""


def caption_rows(items: Dataset, folder: Path) -> Iterator[dict[str, Any]]:
    """The names of all items with their captions, in their order."""
    answers = read_lines(folder / ANSWERS)
    for item, (_, answer) in zip(items.select_columns("file_name"), answers, strict=True):
        error = {"error": answer["error"]} if "error" in answer else {}
        doubt = {name: answer[name] for name in DOUBT if name in answer}
        yield {"file_name": item["file_name"], "caption": answer["text"], **doubt, **error}


def write_captions(items: Dataset, folder: Path, file_type: str, evidence: bool = False) -> dict[str, int]:
    """Writes the table of captions, and returns the numbers of captioned and broken items. A CSV leaves these out."""
    schema = pa.schema([*CAPTION, *DOUBT.items()]) if evidence else CAPTION
    path, counts, broken_names = folder / f"captions.{file_type}", Counter(captioned=0, broken=0), []

    def rows() -> Iterator[dict[str, Any]]:
        for row in tqdm(caption_rows(items, folder), "Writing", len(items)):
            counts["broken" if "error" in row else "captioned"] += 1
            if "error" in row and len(broken_names) < MAX_NAMES:
                broken_names.append(row["file_name"])
            yield row

    with replacing(path) as partial_path:
        if file_type == "jsonl":
            with partial_path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
        elif file_type == "csv":
            schema = schema.remove(2)
            with CSVWriter(partial_path, schema) as writer:
                write_batches(writer, (row for row in rows() if "error" not in row), schema)
        else:
            with pq.ParquetWriter(partial_path, schema) as writer:
                write_batches(writer, rows(), schema)
    print(f"{path} holds {counts['captioned']} captions.")
    if broken_names:
        rest = "" if file_type == "csv" else " and have an `error` there"
        print(f"{counts['broken']} could not be read{rest}: {shortened(broken_names, counts['broken'])}")
    return dict(counts)


def write_txt_files(items: Dataset, folder: Path, place: Literal["beside", "output"]) -> None:
    """Writes each caption into a file of its own, with the name of its image. A file with another text stays."""
    left_out, count, top = [], 0, Path(os.path.abspath(folder / "txt"))
    for item, row in zip(items, caption_rows(items, folder), strict=True):
        if "error" in row:
            continue
        path, text = Path(os.fsdecode(item["path"])), f"{row['caption']}\n"
        is_possible = item["shard_size"] is None
        if place == "output":
            path = Path(os.path.normpath(top / item["file_name"]))
            is_possible = path.is_relative_to(top)  # a member of a .tar may be named ../../a.png
        path = path.with_suffix(".txt")
        if is_possible and not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        elif not is_possible or not path.is_file() or path.read_bytes() != text.encode():
            left_out, count = [*left_out, item["file_name"]][:MAX_NAMES], count + 1
    if count:
        reason = "a file with another text was there, or the image is in a shard"
        print(f"{count} captions have no .txt file, since {reason}: {shortened(left_out, count)}")


def write_page(items: Dataset, folder: Path, num_images: int, evidence: bool, *reading: Any) -> None:
    """Writes `captions.html`: thumbnails of images at equal distances. `reading` are arguments of [`read_item`].

    With `evidence` it shows the images whose captions have the least certain words, these first.
    """
    step, figures = -(-len(items) // num_images), []
    rows = enumerate(caption_rows(items, folder))
    if evidence:
        shown = nsmallest(num_images, rows, key=lambda row: row[1].get("confidence", 1.0))
    else:
        shown = islice(rows, 0, None, step)
    for index, row in shown:
        media, _ = read_item(items[index], *reading)
        image = media[len(media) // 2] if isinstance(media, list) else media
        source = ""
        if image is not None:
            image.thumbnail((256, 256))
            image.save(file := io.BytesIO(), "JPEG")
            source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        text, name = (
            html.escape(row.get(key) or "") for key in ("error" if "error" in row else "caption", "file_name")
        )
        if "confidence" in row:
            word = html.escape(row["least_certain"])
            name += f"<br>{word}: {row['confidence']:.0%}, evidence {row['evidence']:z.1f}"
        figures.append(FIGURE.format(image=source, text=text, name=name))
    write_whole(folder / "captions.html", PAGE.format(figures="".join(figures)))


def shortened(names: list[str], count: int) -> str:
    """The first names of many, for a message."""
    return ", ".join(names[:MAX_NAMES]) + (", …" if count > MAX_NAMES else "")


def write_batches(writer: Any, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    remaining = iter(rows)
    while batch := list(islice(remaining, ROWS)):
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
