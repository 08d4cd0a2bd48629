"""Batches of token windows from shards: `Batches.batch(step)` needs nothing but the step."""

import difflib
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gristmill.background import Answer
from gristmill.errors import InputError
from gristmill.stop import Stop
from gristmill.streaming.ahead import Ahead
from gristmill.streaming.cache import Cache
from gristmill.streaming.config import Remote
from gristmill.streaming.index import INDEX
from gristmill.streaming.mds import MDSReader
from gristmill.streaming.order import Ints, MixPhase, Order, Windows, boundaries
from gristmill.streaming.remote import REMOTE


@dataclass(frozen=True)
class Batch:
    """B windows of S tokens, all int64.

    tokens, targets [B, S]: ids, and the id after each. positions [B, S]: from 0 at each document's start and at the
    window's. document_ids [B, S]: a window's documents from 0; attention stays inside one. sources [B]: indices
    into `Batches.source_names`.
    """

    tokens: Ints
    targets: Ints
    positions: Ints
    document_ids: Ints
    sources: Ints


class Batches:
    """The batches of a run, by step, in any order and from any process.

    shards: directory with one MDS directory per source. steps: of the whole run; the curriculum's fractions refer
    to them. remote: where the shard files lie when `shards` has only their indexes; they are read through the node's
    cache, and those of the next steps are fetched ahead unless `fetch_ahead` is false.

    Raises InputError where seq_len does not divide the blocks, the curriculum names unknown sources or the cache cannot
    be used.
    """

    def __init__(
        self,
        shards: Path,
        seq_len: int,
        sequences_per_batch: int,
        steps: int,
        curriculum: Sequence[MixPhase],
        seed: int,
        remote: Remote | None = None,
        fetch_ahead: bool = True,
    ) -> None:
        if min(seq_len, sequences_per_batch, steps) < 1:
            raise InputError(
                f"seq_len={seq_len}, sequences_per_batch={sequences_per_batch} and steps={steps} must be at least 1"
            )
        self.source_names = sorted(file.parent.name for file in shards.glob(f"*/{INDEX}"))
        if not self.source_names:
            raise InputError(f"{shards} holds no sources: no directory in it has an {INDEX}")
        for name in {name for phase in curriculum for name in phase.sources} - set(self.source_names):
            near = difflib.get_close_matches(name, self.source_names, 1) or self.source_names
            raise InputError(f"curriculum mixes {name!r}, but the shards have {self.source_names}: try {near[0]!r}")
        try:
            self._order = Order(curriculum, self.source_names, steps, sequences_per_batch, seed)
        except ValueError as problem:
            raise InputError(str(problem)) from None
        if remote is None and (shards / REMOTE).exists():
            raise InputError(f"{shards} holds indexes alone, and its shards lie elsewhere; say where (shards.remote)")
        self._fetching: Ahead | None = None
        if remote:
            cache = Cache(remote)
            files = [cache.files(name) for name in self.source_names]
            self._readers = [MDSReader(shards / name, f) for name, f in zip(self.source_names, files, strict=True)]
            cache.check_limit(max(reader.largest_file for reader in self._readers))
            if fetch_ahead:
                self._fetching = Ahead(files, self._readers, self._shards_of, steps, cache.limit_bytes // 2)
        else:
            self._readers = [MDSReader(shards / name) for name in self.source_names]
        for name, reader in zip(self.source_names, self._readers, strict=True):
            if not {"tokens", "starts"} <= reader.column_names:
                raise InputError(
                    f"{shards / name} holds no token blocks (columns tokens and starts); build the shards here"
                )
        self._seq_len, self._sequences_per_batch, self._steps = seq_len, sequences_per_batch, steps
        blocks = [len(reader[0]["tokens"]) - 1 for reader in self._readers]
        self._windows_per_block = blocks[0] // seq_len
        if len(set(blocks)) > 1 or blocks[0] % seq_len:
            fits = [n for n in range(1, min(blocks) + 1) if min(blocks) % n == 0]
            nearest = min(fits, key=lambda n: abs(n - seq_len))
            raise InputError(
                f"seq_len={seq_len} must divide the shards' block_tokens={blocks[0]}; the nearest is {nearest}"
            )
        self.num_windows = [len(reader) * self._windows_per_block for reader in self._readers]
        self._windows = [
            Windows(seed, name, [count * self._windows_per_block for count in reader.samples_per_shard])
            for name, reader in zip(self.source_names, self._readers, strict=True)
        ]

    def samples(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Ints, Ints]:
        """(source, window) of each sequence of a batch, or of one rank's part of it."""
        if not 0 <= step < self._steps:
            raise ValueError(f"step={step} must be from 0 to {self._steps - 1}")
        if self._sequences_per_batch % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"world_size={world_size} must divide sequences_per_batch={self._sequences_per_batch}, "
                f"and rank={rank} lie below it"
            )
        local = self._sequences_per_batch // world_size
        numbers = step * self._sequences_per_batch + rank * local + np.arange(local)
        sources = self._order.sources(numbers)
        counts = self._order.counts(numbers)[np.arange(local), sources]
        windows = np.empty_like(counts)
        for source in np.unique(sources):
            here = sources == source
            windows[here] = self._windows[source](counts[here])
        return sources, windows

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The batch of a step, or the contiguous part of it that one of `world_size` ranks trains on.

        Raises ValueError when `step` is outside of the run or `world_size` does not divide the batch.
        """
        self._look(step, rank, world_size)
        return self._read(step, rank, world_size)

    def _look(self, step: int, rank: int, world_size: int) -> None:
        if self._fetching:
            self._fetching.look(step, rank, world_size)

    def _read(self, step: int, rank: int, world_size: int) -> Batch:
        sources, windows = self.samples(step, rank, world_size)
        length = self._seq_len
        ids = np.empty((len(sources), length + 1), np.int64)
        starts = []
        blocks, places = np.divmod(windows, self._windows_per_block)
        for row, (source, block, place) in enumerate(
            zip(sources.tolist(), blocks.tolist(), places.tolist(), strict=True)
        ):
            sample = self._readers[source][block]
            first = place * length
            ids[row] = sample["tokens"][first : first + length + 1]
            low, high = np.searchsorted(sample["starts"], (first, first + length))
            starts.append(sample["starts"][low:high].astype(np.int64) - first)
        positions, document_ids = boundaries(starts, length)
        return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), positions, document_ids, sources)

    def ahead(
        self,
        steps: Iterable[int],
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        stop: Stop | None = None,
    ) -> Generator[Batch]:
        """Yield the batches of `steps`, which `workers` threads prepare in advance; 0 prepares none.

        Ends early if `stop` is set during the wait for a batch, since a remote store can take minutes. With workers=0
        the caller's own thread reads each batch, and `stop` is not checked meanwhile.
        """
        if workers == 0:
            yield from (self.batch(step, rank, world_size) for step in steps)
            return
        stop = stop or Stop()
        reading: deque[Answer[Batch]] = deque()  # each thread has one to work on while the one before is trained on
        for step in steps:
            oldest = reading.popleft() if len(reading) == workers else None
            batch = oldest and oldest.get(stop)
            if oldest and batch is None:
                return
            self._look(step, rank, world_size)  # here, in the order of the steps
            reading.append(Answer(partial(self._read, step, rank, world_size)))
            if batch:
                yield batch
        while reading and (batch := reading.popleft().get(stop)):
            yield batch

    def _shards_of(self, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        """(source, shard) of all that a batch reads."""
        sources, windows = self.samples(step, rank, world_size)
        found: list[tuple[int, int]] = []
        for source in np.unique(sources).tolist():
            blocks = windows[sources == source] // self._windows_per_block
            found += [(source, shard) for shard in np.unique(self._readers[source].shard_of(blocks)).tolist()]
        return found

    def source_counts(self, step: int) -> dict[str, int]:
        """How many sequences of each source the steps before `step` trained on. `step` may be the number of steps."""
        if not 0 <= step <= self._steps:
            raise ValueError(f"step={step} must be from 0 to {self._steps}")
        counts = self._order.counts(np.array([step * self._sequences_per_batch]))[0]
        return dict(zip(self.source_names, counts.tolist(), strict=True))

    def curriculum_stage(self, step: int) -> int:
        """The number of the curriculum's phase that a step belongs to."""
        return int(self._order.phase(np.array([step * self._sequences_per_batch]))[0])
