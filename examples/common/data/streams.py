"""Endless streams of rows: shuffled, mixed by weight, split among readers, and resumed at the exact row.

A reader is one DataLoader worker of one process, or a process without workers. Each reader goes round its own part of
every data set for ever, in a new order each round. So readers never wait for each other and every batch is full.

`datasets` reads files, shuffles shards, splits them and keeps the position. accelerate's `use_stateful_dataloader`
cannot replace the rest: `interleave_datasets` leaves a mixture as many shards as its smallest data set has, a state
does not hold the content of a shuffle buffer (its docstring says so), and a state cannot be loaded in the workers of a
shuffled stream.
"""

import copy
import logging as python_logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod
from itertools import count, islice
from typing import Any

import fsspec
import numpy as np
import torch
from datasets import Image, IterableDataset, Video
from datasets.distributed import split_dataset_by_node
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from torch.utils.data import get_worker_info
from transformers.utils import logging

logger = logging.get_logger(__name__)

EPOCH = "__epoch__"  # a column added to each row: the rounds that its reader had completed in the row's data set
INTERLEAVED_SHARDS = 10  # shards that a reader takes rows from by turns
DRAWS_AT_ONCE = 1000  # choices of a data set, drawn together


@contextmanager
def tolerant_reading() -> Iterator[None]:
    """While open, `datasets` reads WebDataset members as they are, and does not warn in vain.

    `datasets` decodes all members of a sample, also those of unused columns. One broken member would end the stream,
    and no argument says otherwise; here it becomes None. In place of a member, `datasets` would read a file of that
    name, if there is one. Its warning about the lost content of a shuffle buffer is void here: the buffer is empty
    whenever a state is taken.
    """

    def is_needed(record: python_logging.LogRecord) -> bool:
        return "shuffle buffer" not in str(record.msg)

    decoders = WebDataset.DECODERS
    dataset_logger = python_logging.getLogger("datasets.iterable_dataset")
    WebDataset.DECODERS = {suffix: partial(_decode_or_none, decode) for suffix, decode in decoders.items()}
    dataset_logger.addFilter(is_needed)
    encoders = {feature: feature.encode_example for feature in (Image, Video)}
    for feature, encode in encoders.items():
        feature.encode_example = partialmethod(_keep_bytes, encode)
    try:
        yield
    finally:
        for feature, encode in encoders.items():
            feature.encode_example = encode
        WebDataset.DECODERS = decoders
        dataset_logger.removeFilter(is_needed)


def _decode_or_none(decode: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return decode(data)
    except Exception:  # text, JSON, NumPy and other decoders raise errors of many types
        return None


def _keep_bytes(feature: Image | Video, encode: Callable[[Any, Any], Any], value: Any) -> Any:
    has_bytes = isinstance(value, dict) and value.get("bytes") is not None
    return {"bytes": value["bytes"], "path": value.get("path")} if has_bytes else encode(feature, value)


@dataclass
class Source:
    """One of a stream's data sets."""

    name: str  # in messages
    dataset: IterableDataset
    weight: float = 1.0  # its share of the rows, relative to the other weights
    group: partial[list[dict[str, Any]]] | None = None  # joins the rows of one image
    splittable: bool = True  # False: readers have no shards of their own; each reads all rows and keeps its share

    @property
    def num_shards(self) -> int:
        return self.dataset.num_shards if self.splittable else 1


def count_shard_groups(num_shards: int, num_readers: int) -> int:
    """Number of groups that shards are divided into. The readers of a group share its rows, one row each in turn.

    With at least as many shards as readers, each reader has its own group; some groups have one shard more. With
    fewer shards, all groups have the same size and the same number of readers: `gcd(num_shards, num_readers)` groups.
    """
    return num_readers if num_shards >= num_readers else math.gcd(num_shards, num_readers)


def select_share(source: Source, generator: np.random.Generator, reader: int, num_readers: int) -> IterableDataset:
    """The rows of one reader, from 0. Each row goes to one reader, if `generator` has the same state for all."""
    groups = count_shard_groups(source.num_shards, num_readers)
    interleaved = min(INTERLEAVED_SHARDS, source.num_shards // groups)
    # A buffer of one row shuffles shards only. It holds no rows that a state would miss.
    dataset = source.dataset.shuffle(generator=generator, buffer_size=1, max_buffer_input_shards=interleaved)
    if groups > 1:
        dataset = dataset.shard(groups, reader % groups)
    if num_readers > groups:
        dataset = split_dataset_by_node(dataset, reader // groups, num_readers // groups, strategy="examples")
    return dataset


@dataclass
class SourceReader:
    """Goes round one reader's share of a data set for ever, each time in a new order.

    Rows are read in blocks, and each block is shuffled. A state holds the position of a block's first row and the
    number of rows already returned from the block. So at most one block is read again after a resume. A state is JSON.
    """

    source: Source
    seed: int
    reader: int
    num_readers: int
    buffer_size: int  # rows in a block
    state: dict[str, Any] | None = None  # after the latest row; at first that of another reader, to go on from

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, each with its completed rounds as [`EPOCH`]. No rows or a damaged file raise a ValueError."""
        state = self.state or {"epoch": 0, "block": 0, "taken": 0, "dataset": None}
        while True:
            yield from self._round(**state)
            state = {"epoch": state["epoch"] + 1, "block": 0, "taken": 0, "dataset": None}

    def _round(self, epoch: int, block: int, taken: int, dataset: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        generator = np.random.default_rng((self.seed, epoch))
        rows = select_share(self.source, generator, self.reader, self.num_readers)
        if dataset is not None:
            rows.load_state_dict(dataset)
        unread = rows.iter(batch_size=1)  # unlike `iter(rows)`, this does not split rows among workers once more
        for number in count(block):
            start = dataset or rows.state_dict()
            dataset = None
            held = self._read_block(unread)
            if not held:
                break
            order = np.random.default_rng((self.seed, self.reader, epoch, number)).permutation(len(held))
            for index in order[taken:]:
                taken += 1
                self.state = {"epoch": epoch, "block": number, "taken": taken, "dataset": start}
                yield {**held[index], EPOCH: epoch}
            taken = 0
            held.clear()  # frees the block before the next one is read
        if number == 0:
            raise ValueError(
                f"{self.source.name} has no rows for reader {self.reader + 1} of {self.num_readers} (processes x "
                "workers): there are fewer rows than readers, or a shard is empty."
            )

    def _read_block(self, unread: Iterator[dict[str, list[Any]]]) -> list[dict[str, Any]]:
        try:
            with tolerant_reading():
                batches = islice(unread, self.buffer_size)  # of one row each
                rows = [{name: values[0] for name, values in batch.items()} for batch in batches]
        except Exception as error:  # tar, Parquet, text and the network raise errors of many types
            raise ValueError(f"{self.source.name}: a file, not only a row, cannot be read: {error!r}") from error
        return rows if self.source.group is None else self.source.group(rows)


class CaptionStream(torch.utils.data.IterableDataset):
    """Rows of one or several data sets, for ever. Each reader holds and shuffles `buffer_size` rows of all."""

    def __init__(self, sources: list[Source], seed: int, buffer_size: int):
        if buffer_size < 1:
            raise ValueError(f"`shuffle_buffer` must be 1 or more, but is {buffer_size}.")
        self.sources = sources
        self.seed = seed
        self.buffer_size = buffer_size
        self.rank, self.world_size = 0, 1
        self.next_reader = 0
        self.states: dict[int, dict[str, Any]] = {}
        self.position: tuple[int, dict[str, Any]] | None = None  # the reader, and its state after its latest row

    @property
    def shares(self) -> list[float]:
        """The share of each data set, from 0 to 1."""
        return [source.weight / sum(source.weight for source in self.sources) for source in self.sources]

    def split(self, rank: int, world_size: int, num_workers: int) -> None:
        """Selects the share of a process; its workers divide it further. Warns of shards that several readers read."""
        self.rank, self.world_size = rank, world_size
        workers = max(1, num_workers)
        num_readers = world_size * workers
        for source in self.sources if rank == 0 else []:
            if source.num_shards < num_readers:
                times = num_readers // count_shard_groups(source.num_shards, num_readers)
                apart = " Rows of one image are then read apart, and few are grouped." if source.group else ""
                logger.warning(
                    f"{source.name} has {source.num_shards} shards for {num_readers} readers ({world_size} processes "
                    f"x {workers} workers): {times} of them read each shard and share its rows. With {num_readers} "
                    f"shards or more, each shard is read once.{apart}"
                )

    def describe(self) -> dict[str, Any]:
        """The settings under which a state is valid."""
        sources = [[source.name, source.weight, source.num_shards] for source in self.sources]
        for described, source in zip(sources, self.sources, strict=True):
            described += [source.group.keywords["data_args"].group_by] if source.group else []
        return {"seed": self.seed, "shuffle_buffer": self.buffer_size, "data sets, weights and shards": sources}

    def load_states(self, states: dict[int, dict[str, Any]], next_reader: int) -> None:
        """Goes on from the latest state of each reader of this process, by index. A missing reader starts anew."""
        self.states, self.next_reader = states, next_reader

    def from_start(self) -> Iterator[dict[str, Any]]:
        """The rows of this reader from its first one on. The stream itself stays where it is."""
        stream = copy.copy(self)
        stream.states = {}
        return iter(stream)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        if worker:
            fsspec.asyn.reset_lock()  # a lock that the parent process held while reading URLs could block this one
        # The DataLoader takes its first batch from its first worker, so that worker plays the next reader.
        local_reader = ((worker.id if worker else 0) + self.next_reader) % workers
        reader, num_readers = self.rank * workers + local_reader, self.world_size * workers
        state = self.states.get(local_reader, {"drawn": 0, "sources": [None] * len(self.sources)})
        source_readers = [
            SourceReader(source, self.seed, reader, num_readers, math.ceil(self.buffer_size * share), saved)
            for source, share, saved in zip(self.sources, self.shares, state["sources"], strict=True)
        ]
        rows = [iter(source_reader) for source_reader in source_readers]
        for drawn in count(state["drawn"]):
            if drawn % DRAWS_AT_ONCE == 0 or drawn == state["drawn"]:
                generator = np.random.default_rng((self.seed, reader, drawn // DRAWS_AT_ONCE))
                chosen = generator.choice(len(rows), size=DRAWS_AT_ONCE, p=self.shares)
            row = next(rows[chosen[drawn % DRAWS_AT_ONCE]])
            states = [source_reader.state for source_reader in source_readers]
            self.position = local_reader, {"drawn": drawn + 1, "sources": states}
            yield row
