"""Endless streams of rows: shuffled, mixed by weights, split over all readers, and taken up exactly where they stood.

A reader is one DataLoader worker of one process, or a process without workers. Each goes round its own part of every
data set for ever, in another order each time, so readers never wait for each other and no batch is ever short.

`datasets` reads, shuffles shards, splits and keeps the place; its own ways to do the rest do not go together:
`interleave_datasets` leaves a mixture as many shards as its smallest data set has, a shuffle buffer's content is not
part of a state (its docstring says so), and a state cannot be loaded in the workers of a shuffled stream.
"""

import logging as python_logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import fsspec
import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info
from transformers.utils import logging

logger = logging.get_logger(__name__)

EPOCH = "__epoch__"  # a column that a stream adds: how often its reader had gone round the row's data set before

# `datasets` warns that a shuffle buffer's content is lost; the one used here is empty whenever a state is taken.
python_logging.getLogger("datasets.iterable_dataset").addFilter(lambda record: "shuffle buffer" not in str(record.msg))

INTERLEAVED = 10  # shards that a reader reads from by turns
DRAWS = 1000  # of data sets, made at once


@dataclass
class Source:
    """One of a stream's data sets.

    Args:
        name: What messages call it.
        dataset: Its rows.
        weight: Its share of the rows, relative to that of the other data sets.
        splittable: Whether readers may have shards of their own. Else each reads the whole, for its share of the rows.
    """

    name: str
    dataset: IterableDataset
    weight: float = 1.0
    splittable: bool = True

    @property
    def num_shards(self) -> int:
        return self.dataset.num_shards if self.splittable else 1


def count_piles(num_shards: int, readers: int) -> int:
    """Into how many piles shards are dealt. The readers of a pile share its rows out, one row to each in turn.

    With as many shards as readers or more, each reader has a pile of its own, some with one shard more than others.
    With fewer, all piles are alike, so all readers get as many rows: `gcd(num_shards, readers)` piles.
    """
    return readers if num_shards >= readers else math.gcd(num_shards, readers)


def take_part(source: Source, generator: np.random.Generator, part: int, readers: int) -> IterableDataset:
    """The rows that one of several readers gets: no row goes to two of them, and none to nobody.

    Args:
        source: The data set.
        generator: In the same state for all readers; shuffles the shards before they are dealt.
        part: Which reader, from 0.
        readers: How many there are.
    """
    piles = count_piles(source.num_shards, readers)
    interleaved = min(INTERLEAVED, source.num_shards // piles)
    # A buffer of one row shuffles no rows, and holds none that a state would not tell.
    dataset = source.dataset.shuffle(generator=generator, buffer_size=1, max_buffer_input_shards=interleaved)
    if piles > 1:
        dataset = dataset.shard(piles, part % piles)
    if readers > piles:
        dataset = split_dataset_by_node(dataset, part // piles, readers // piles, strategy="examples")
    return dataset


class SourceReader:
    """Goes round one reader's part of a data set for ever, each time in another order.

    Rows are read in blocks, and each block is shuffled. A state names the beginning of a block and how much of it has
    been handed out, so no more than one block is read again.

    Args:
        source ([`Source`]): The data set.
        seed (`int`): Of all draws.
        part, readers (`int`): Which reader it is, of how many.
        buffer_size (`int`): Rows in a block, which ends at the end of the data set at the latest.
        state (`dict`, *optional*): Where to go on: the `state` of another one after some row. JSON can hold it.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        part: int,
        readers: int,
        buffer_size: int,
        state: dict[str, Any] | None = None,
    ):
        self.source = source
        self.seed = seed
        self.part = part
        self.readers = readers
        self.buffer_size = buffer_size
        self.state = state

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, with the number of rounds before as [`EPOCH`].

        Raises:
            ValueError: If there are none for this reader, or a file is damaged or cannot be reached.
        """
        state = self.state or {"epoch": 0, "block": 0, "taken": 0, "dataset": None}
        yield from self._round(**state)
        for epoch in count(state["epoch"] + 1):
            yield from self._round(epoch, 0, 0, None)

    def _round(self, epoch: int, block: int, taken: int, dataset: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        rows = take_part(self.source, np.random.default_rng((self.seed, epoch)), self.part, self.readers)
        if dataset is not None:
            rows.load_state_dict(dataset)
        unread = rows.iter(batch_size=1)  # unlike `iter(rows)`, this does not split rows among workers once more
        for number in count(block):
            start = dataset or rows.state_dict()
            dataset = None
            try:
                held = [{name: values[0] for name, values in one.items()} for one in islice(unread, self.buffer_size)]
            except Exception as error:  # of many kinds: what tar, Parquet, text and network raise
                raise ValueError(f"{self.source.name}: a file, not only a row, cannot be read: {error!r}") from error
            if not held:
                break
            order = np.random.default_rng((self.seed, self.part, epoch, number)).permutation(len(held))
            for index in order[taken:]:
                taken += 1
                self.state = {"epoch": epoch, "block": number, "taken": taken, "dataset": start}
                yield {**held[index], EPOCH: epoch}
            taken = 0
            held.clear()  # before the next block is read
        if number == 0:
            raise ValueError(
                f"{self.source.name} has no rows for reader {self.part + 1} of {self.readers} (processes x workers): "
                "there are fewer rows than readers, or a shard is empty."
            )


class CaptionStream(torch.utils.data.IterableDataset):
    """Rows of one or several data sets, for ever. A data set that is at its end starts again; the others go on.

    Args:
        sources ([`list[Source]`]): The data sets.
        seed (`int`): Of all draws.
        buffer_size (`int`): Rows that each reader holds and shuffles, of all data sets together.
    """

    def __init__(self, sources: list[Source], seed: int, buffer_size: int):
        if buffer_size < 1:
            raise ValueError(f"`shuffle_buffer` must be 1 or more, but is {buffer_size}.")
        self.sources = sources
        self.seed = seed
        self.buffer_size = buffer_size
        self.rank, self.world_size = 0, 1
        self.next_reader = 0
        self.states: dict[int, dict[str, Any]] = {}
        self.place: tuple[int, dict[str, Any]] | None = None  # the reader, and its state after the row it gave last

    @property
    def shares(self) -> list[float]:
        """Of each data set, from 0 to 1."""
        return [source.weight / sum(one.weight for one in self.sources) for source in self.sources]

    def split(self, rank: int, world_size: int, num_workers: int) -> None:
        """Takes a process's part, of which each worker will take its own; warns of shards that are read repeatedly."""
        self.rank, self.world_size = rank, world_size
        workers = max(1, num_workers)
        readers = world_size * workers
        for source in self.sources if rank == 0 else []:
            if source.num_shards < readers:
                times = readers // count_piles(source.num_shards, readers)
                logger.warning(
                    f"{source.name} has {source.num_shards} shards for {readers} readers ({world_size} processes x "
                    f"{workers} workers): {times} of them read each shard and share its rows out. With {readers} "
                    "shards or more, each shard is read once."
                )

    def describe(self) -> dict[str, Any]:
        """What must be as it was for a state to hold."""
        sources = [[source.name, source.weight, source.num_shards] for source in self.sources]
        return {"seed": self.seed, "shuffle_buffer": self.buffer_size, "data sets, weights and shards": sources}

    def load_states(self, states: dict[int, dict[str, Any]], next_reader: int) -> None:
        """Goes on where the readers of this process stood.

        Args:
            states: The last state of each reader, by its number in the process. A reader that is not in it starts.
            next_reader: Whose turn it is.
        """
        self.states, self.next_reader = states, next_reader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        if worker:
            fsspec.asyn.reset_lock()  # URLs that the parent process has read from could block this one
        # A DataLoader's first batch comes from its first worker, which takes the part whose turn it is.
        reader = ((worker.id if worker else 0) + self.next_reader) % workers
        part, readers = self.rank * workers + reader, self.world_size * workers
        state = self.states.get(reader, {"drawn": 0, "sources": [None] * len(self.sources)})
        opened = [
            SourceReader(source, self.seed, part, readers, math.ceil(self.buffer_size * share), saved)
            for source, share, saved in zip(self.sources, self.shares, state["sources"], strict=True)
        ]
        rows = [iter(source) for source in opened]
        for drawn in count(state["drawn"]):
            if drawn % DRAWS == 0 or drawn == state["drawn"]:
                draws = np.random.default_rng((self.seed, part, drawn // DRAWS))
                chosen = draws.choice(len(rows), size=DRAWS, p=self.shares)
            row = next(rows[chosen[drawn % DRAWS]])
            self.place = reader, {"drawn": drawn + 1, "sources": [source.state for source in opened]}
            yield row
