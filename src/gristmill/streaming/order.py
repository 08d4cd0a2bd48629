"""Which windows a step trains on: a pure function of (seed, curriculum, step). No state, no files, numpy only.

Samples are numbered over the whole run, g = step * sequences_per_batch + i. `Order` says of each g its source and how
many samples of that source came before it; `Windows` turns that count k into a window: each epoch over a source is a
new order of its windows. World size, workers and restarts do not occur here, so they cannot change the order.

Randomness is splitmix64 (Steele, Lea, Flood 2014) written out below: streams of a library may change between its
versions, the order of a run may not.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

CYCLE = 4096  # samples after which a phase's mix is exact: weights are rounded to 1/4096
RAMP_PIECES = 64  # pieces of constant mix that approximate a ramp
OPEN_SHARDS = 8  # of a source that are read at a time: half a gigabyte of them mixes well, and fits any cache


@dataclass(frozen=True, kw_only=True)
class MixPhase:
    """A phase of the curriculum: a part of training with one mix of sources, or with a mix that changes linearly.

    until: the fraction of the run's steps at which it ends. mix: source -> weight, by sequences; weights are relative
    to their sum, and a source that is not named gets none. to: the mix at the end of a ramp; None keeps `mix`.
    """

    until: float
    mix: dict[str, float]
    to: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until={self.until} must be above 0 and at most 1: a fraction of training")
        for name in ("mix", "to"):
            mix = getattr(self, name)
            if mix is not None and not (all(0 <= w < float("inf") for w in mix.values()) and sum(mix.values()) > 0):
                raise ValueError(f"{name}={mix} must have finite weights of at least 0, and one above 0")

    @property
    def sources(self) -> set[str]:
        return set(self.mix) | set(self.to or ())


def check_curriculum(curriculum: Sequence[MixPhase], names: Sequence[str] | None = None) -> None:
    """Raises ValueError unless the phases ascend to 1.0 and name known sources (where `names` is given)."""
    ends = [phase.until for phase in curriculum]
    if not ends or ends[-1] != 1.0 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"curriculum has stages until {ends}: they must ascend, and the last must be 1.0")
    for phase in curriculum:
        unknown = sorted(phase.sources - set(names)) if names is not None else []
        if unknown:
            raise ValueError(f"curriculum mixes unknown sources {unknown}; the shards have {sorted(names or ())}")


# ---- randomness ----------------------------------------------------------------------------------------


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One output of the generator for each state: a bijection of 64 bits that looks random."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive(seed: int, *parts: int | str) -> int:
    """A 64-bit key for one purpose, independent of the keys for other parts."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hashed(key: int, numbers: Ints) -> NDArray[np.uint64]:
    """A 64-bit number for each number, random by key; different ones for different numbers."""
    return splitmix64(numbers.astype(np.uint64) ^ splitmix64(np.array([key], np.uint64)))


def shuffled(key: int, numbers: Ints) -> Ints:
    """The numbers in an order random by key: sorted by hash. No two hashes are equal, so the order is unique."""
    return numbers[np.argsort(hashed(key, numbers))]


# ---- mixing sources ------------------------------------------------------------------------------------


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that sum to `total`, by the largest remainder.

    Raises ValueError when a weight above 0 would get nothing.
    """
    scale = total / sum(weights)
    counts = [int(weight * scale) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - weights[i] * scale, i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for weight, count in zip(weights, counts, strict=True):
        if weight > 0 and count == 0:
            raise ValueError(
                f"mix weights {list(weights)}: {weight} is below 1/{total} of their sum; raise it or set it to 0"
            )
    return counts


def spread(counts: Sequence[int], key: int) -> Ints:
    """A sequence in which i occurs counts[i] times, evenly: in every prefix each i is within len(counts) of its share.

    The j-th of n occurrences wants a random place in the j-th n-th of the sequence (stratified sampling);
    sorting all wishes gives the sequence. Even mixing keeps each batch close to the mix.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    turn = np.concatenate([np.arange(count) for count in counts])
    jitter = (hashed(key, np.arange(len(source))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return source[np.argsort((turn + jitter) / np.array(counts)[source], kind="stable")].astype(np.int64)


def pieces(curriculum: Sequence[MixPhase]) -> list[tuple[int, float, dict[str, float]]]:
    """(phase, until, mix); a ramp becomes pieces of constant mix, each with the mix in its middle."""
    cut: list[tuple[int, float, dict[str, float]]] = []
    start = 0.0
    for number, phase in enumerate(curriculum):
        if phase.to is None:
            cut.append((number, phase.until, phase.mix))
        else:
            for piece in range(RAMP_PIECES):
                mix = between(phase.mix, phase.to, (piece + 0.5) / RAMP_PIECES)
                cut.append((number, start + (phase.until - start) * (piece + 1) / RAMP_PIECES, mix))
        start = phase.until
    return cut


def between(first: Mapping[str, float], last: Mapping[str, float], share: float) -> dict[str, float]:
    """The mix at that share of the way; what a cycle cannot express is none."""
    mix = {n: (1 - share) * first.get(n, 0.0) + share * last.get(n, 0.0) for n in sorted({*first, *last})}
    least = sum(mix.values()) / CYCLE
    return {name: weight if weight >= least else 0.0 for name, weight in mix.items()}


class Order:
    """The sources of a run's samples. `names` fixes the numbers of the sources; all arrays below use them."""

    def __init__(
        self, curriculum: Sequence[MixPhase], names: Sequence[str], steps: int, sequences_per_batch: int, seed: int
    ) -> None:
        """Raises ValueError for a curriculum that `check_curriculum` refuses or that CYCLE cannot express."""
        check_curriculum(curriculum, names)
        phases, untils, mixes = zip(*pieces(curriculum), strict=True)
        self._phases: Ints = np.array(phases)  # of pieces
        first_steps = [0, *(round(until * steps) for until in untils)]
        self._starts: Ints = np.array(first_steps) * sequences_per_batch  # of pieces, then the run's end
        cycles = []
        for index, mix in enumerate(mixes):
            counts = apportion([mix.get(name, 0.0) for name in names], CYCLE)
            cycles.append(spread(counts, derive(seed, "mix", index)))
        self._cycles = np.stack(cycles)  # [pieces, CYCLE] -> source
        one_hot = self._cycles[:, :, None] == np.arange(len(names))
        self._used = np.zeros((len(cycles), CYCLE + 1, len(names)), np.int16)  # by a prefix of a cycle
        np.cumsum(one_hot, axis=1, out=self._used[:, 1:])
        self._before = np.zeros((len(cycles), len(names)), np.int64)  # used by all earlier pieces
        for piece in range(1, len(cycles)):
            self._before[piece] = self._counts(self._starts[piece : piece + 1], np.array([piece - 1]))[0]

    def phase(self, samples: Ints) -> Ints:
        """The number of the curriculum's phase of each sample number."""
        return np.asarray(self._phases[self._piece(samples)])

    def sources(self, samples: Ints) -> Ints:
        """The source of each sample number. [n] -> [n]"""
        piece = self._piece(samples)
        return np.asarray(self._cycles[piece, (samples - self._starts[piece]) % CYCLE])

    def counts(self, samples: Ints) -> Ints:
        """How many samples of each source come before each sample number. [n] -> [n, sources]"""
        return self._counts(samples, self._piece(samples))

    def _piece(self, samples: Ints) -> Ints:
        return np.searchsorted(self._starts[1:-1], samples, side="right")

    def _counts(self, samples: Ints, piece: Ints) -> Ints:
        cycle, place = np.divmod(samples - self._starts[piece], CYCLE)
        whole = self._used[piece, CYCLE] * cycle[:, None]
        return np.asarray(self._before[piece] + whole + self._used[piece, place])


# ---- windows -------------------------------------------------------------------------------------------


class Windows:
    """The order in which one source's windows are read: every window once in an epoch, each epoch anew.

    An epoch takes the shards in a new order, OPEN_SHARDS at a time, and mixes the windows of those: nearly sequential
    to read, and no more than the windows of one group are ever held.
    """

    def __init__(self, seed: int, name: str, windows_per_shard: Sequence[int]) -> None:
        self._ends = np.cumsum(windows_per_shard, dtype=np.int64)
        self._key = partial(derive, seed)
        self._name = name
        self._epoch = lru_cache(maxsize=2)(self._groups_of)
        self._group = lru_cache(maxsize=4)(self._windows_of)  # two, and two more where one epoch passes into the next

    def __call__(self, k: Ints) -> Ints:
        """The window of the source's k-th sample of the run. [n] -> [n]"""
        epochs, places = np.divmod(k, self._ends[-1])
        windows = np.empty_like(k)
        for epoch in np.unique(epochs).tolist():
            ends = self._epoch(epoch)[1]
            groups = np.where(epochs == epoch, np.searchsorted(ends, places, side="right"), -1)
            for group in np.unique(groups[groups >= 0]).tolist():
                here = groups == group
                first = int(ends[group - 1]) if group else 0
                windows[here] = self._group(epoch, group)[places[here] - first]
        return windows

    def _groups_of(self, epoch: int) -> tuple[list[Ints], Ints]:
        """The shards of each group, and the number of windows up to each group's end."""
        order = shuffled(self._key("shards", self._name, epoch), np.arange(len(self._ends)))
        groups = [order[first : first + OPEN_SHARDS] for first in range(0, len(order), OPEN_SHARDS)]
        sizes = np.diff(self._ends, prepend=0)
        return groups, np.cumsum([sizes[group].sum() for group in groups])

    def _windows_of(self, epoch: int, group: int) -> Ints:
        shards = np.sort(self._epoch(epoch)[0][group])
        ranges = [np.arange(self._ends[shard - 1] if shard else 0, self._ends[shard]) for shard in shards.tolist()]
        return shuffled(self._key("windows", self._name, epoch), np.concatenate(ranges))


def boundaries(starts: Sequence[Ints], length: int) -> tuple[Ints, Ints]:
    """Positions and document numbers of windows. `starts[b]`: offsets in window b at which documents start.

    Returns (positions, document_ids), both [B, length]: positions count from 0 at each document's start and at the
    window's; document_ids number a window's documents from 0.
    """
    first = np.zeros((len(starts), length), np.bool_)
    for row, offsets in enumerate(starts):
        first[row, offsets] = True
    first[:, 0] = True
    place = np.arange(length, dtype=np.int64)
    positions = place - np.maximum.accumulate(np.where(first, place, 0), axis=1)
    return positions, np.cumsum(first, axis=1, dtype=np.int64) - 1
