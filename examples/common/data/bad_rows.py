"""What DataLoader workers tell the main process with each batch: rows that were skipped, and how far a stream is read.

Only what belongs to a batch that was trained on counts; workers read ahead of it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import BatchFeature

from common.data.collator import CaptionCollator
from common.data.streams import CaptionStream
from common.files import write_whole

RECORD = "record"  # in a batch: JSON, which nothing on the way takes apart
BAD_ROWS = "bad_rows.jsonl"


class RecordingCollator:
    """Makes batches as another collator does, and puts a record into each, which [`EVLGenTrainer`] takes out.

    Args:
        collator ([`CaptionCollator`]): Makes the batches.
        dataset: Where the rows are from.
    """

    def __init__(self, collator: CaptionCollator, dataset: torch.utils.data.Dataset):
        self.collator = collator
        self.dataset = dataset

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        self.collator.bad_rows = []
        batch = self.collator(rows)
        worker = get_worker_info()
        dataset = worker.dataset if worker else self.dataset
        place = dataset.place if isinstance(dataset, CaptionStream) else None
        batch[RECORD] = json.dumps({"bad_rows": self.collator.bad_rows, "place": place})
        return batch


def add_bad_rows(folder: Path, bad_rows: list[dict[str, Any]], step: int) -> None:
    """Adds rows that were skipped in a step to a folder's list of them; other processes may do so at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(_line({"step": step, **row}) for row in bad_rows)
    with (folder / BAD_ROWS).open("ab", buffering=0) as file:  # one write, which is not cut by another
        file.write(lines.encode())


def forget_bad_rows(folder: Path, step: int) -> None:
    """Takes those after a step off a folder's list: training goes on from there, and will meet them again."""
    kept = [row for row in read_bad_rows(folder) if row["step"] <= step]
    if kept:
        write_whole(folder / BAD_ROWS, "".join(map(_line, kept)))
    else:
        (folder / BAD_ROWS).unlink(missing_ok=True)


def read_bad_rows(folder: Path) -> list[dict[str, Any]]:
    """A folder's list of rows that were skipped."""
    path = folder / BAD_ROWS
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]  # the last one may have been cut off


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
