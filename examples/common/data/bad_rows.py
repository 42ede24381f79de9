"""The rows that a training run skipped: each batch brings its own, and a file lists those of all steps.

DataLoader workers read ahead, and each has a copy of the collator. So only a batch can tell which rows were skipped
when it was made, and how far the stream behind it has been read. They count once the batch is trained on.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import BatchFeature

from common.data.collator import CaptionCollator, EmptyBatchError
from common.data.streams import CaptionStream
from common.files import write_whole

BAD_ROWS = "bad_rows.jsonl"
STREAM_ROWS = 1000  # of a stream, which has no end, that are tried in place of bad ones


class TrainingCollator:
    """Adds `bad_rows`, a list, to each batch, and `position` to one of a stream. [`EVLGenTrainer`] takes them out.

    Args:
        collator ([`CaptionCollator`]): Makes the batches.
        dataset: The training data set.
    """

    def __init__(self, collator: CaptionCollator, dataset: torch.utils.data.Dataset):
        self.collator = collator
        self.dataset = dataset

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        worker = get_worker_info()
        dataset = worker.dataset if worker else self.dataset
        self.collator.bad_rows = []
        try:
            batch = self.collator(rows)
        except EmptyBatchError:
            batch = self._first_good_batch(dataset, len(rows))
        batch["bad_rows"] = self.collator.bad_rows
        if isinstance(dataset, CaptionStream):
            batch["position"] = dataset.position
        return batch

    def _first_good_batch(self, dataset: torch.utils.data.Dataset, size: int) -> BatchFeature:
        """Stands in for a batch of bad rows alone, since every process must take the step.

        A resumed run needs the same batch, so it comes from the start of the data set, or of the reader's stream.
        Raises an EmptyBatchError if all rows of the data set are bad, or the first [`STREAM_ROWS`] of a stream.
        """
        skipped = list(self.collator.bad_rows)
        is_stream = isinstance(dataset, CaptionStream)
        rows = islice(dataset.from_start(), STREAM_ROWS) if is_stream else (dataset[i] for i in range(len(dataset)))
        for candidates in iter(lambda: list(islice(rows, size)), []):
            try:
                batch = self.collator(candidates)
            except EmptyBatchError:
                continue
            self.collator.bad_rows = skipped
            return batch
        found = f"first {STREAM_ROWS} rows of a stream" if is_stream else f"{len(dataset)} rows of the training split"
        raise EmptyBatchError(f"None of the {found} can be used.")


def add_bad_rows(folder: Path, bad_rows: list[dict[str, Any]], step: int) -> None:
    """Appends the rows skipped in a step to the list in a folder; several processes may do so at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(_line({"step": step, **row}) for row in bad_rows)
    with (folder / BAD_ROWS).open("ab", buffering=0) as file:  # one write is not torn apart by another process
        file.write(lines.encode())


def forget_bad_rows(folder: Path, step: int) -> None:
    """Removes the rows skipped after a step: training goes on from there and meets them again."""
    kept = [row for row in read_bad_rows(folder) if row["step"] <= step]
    if kept:
        write_whole(folder / BAD_ROWS, "".join(map(_line, kept)))
    else:
        (folder / BAD_ROWS).unlink(missing_ok=True)


def read_bad_rows(folder: Path) -> list[dict[str, Any]]:
    """The skipped rows listed in a folder."""
    path = folder / BAD_ROWS
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]  # a kill may have cut the last one off


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
