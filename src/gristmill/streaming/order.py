"""Which windows a step trains on: a pure function of (seed, curriculum, step). No state, no files, numpy only.

Samples are numbered over the whole run, g = step * sequences_per_batch + i. `Order` says of each g its source and how
many samples of that source came before it; `window` turns that count k into a window: each epoch over a source is a new
permutation of its windows. World size, workers and restarts do not occur here, so they cannot change the order.

Randomness is splitmix64 (Steele, Lea, Flood 2014) written out below: streams of a library may change between its
versions, the order of a run may not.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

CYCLE = 4096  # samples after which a stage's mix is exact: weights are rounded to 1/4096


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of training with one mix of sources.

    until: the fraction of the run's steps at which it ends. mix: source -> weight, by sequences; weights are relative
    to their sum, and a source that is not named gets none.
    """

    until: float
    mix: dict[str, float]

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until={self.until} must be above 0 and at most 1: a fraction of training")
        wrong = {name: weight for name, weight in self.mix.items() if not 0 <= weight < float("inf")}
        if wrong or not sum(self.mix.values()) > 0:
            raise ValueError(f"mix={self.mix} must have finite weights of at least 0, and one above 0")


def check_curriculum(curriculum: Sequence[Stage], names: Sequence[str] | None = None) -> None:
    """Raises ValueError unless stages follow each other up to 1.0 and name known sources (where `names` is given)."""
    ends = [stage.until for stage in curriculum]
    if not ends or ends[-1] != 1.0 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"curriculum has stages until {ends}: they must ascend, and the last must be 1.0")
    for stage in curriculum:
        unknown = sorted(set(stage.mix) - set(names)) if names is not None else []
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


def hashed(key: int, count: int) -> NDArray[np.uint64]:
    """`count` distinct 64-bit numbers, random by key."""
    return splitmix64(np.arange(count, dtype=np.uint64) ^ splitmix64(np.array([key], np.uint64)))


def permutation(key: int, count: int) -> Ints:
    """0 … count - 1 in an order random by key: sorted by hash. No two hashes are equal, so the order is unique."""
    return np.argsort(hashed(key, count)).astype(np.int64)


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
    jitter = (hashed(key, len(source)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return source[np.argsort((turn + jitter) / np.array(counts)[source], kind="stable")].astype(np.int64)


class Order:
    """The sources of a run's samples. `names` fixes the numbers of the sources; all arrays below use them."""

    def __init__(
        self, curriculum: Sequence[Stage], names: Sequence[str], steps: int, sequences_per_batch: int, seed: int
    ) -> None:
        """Raises ValueError for a curriculum that `check_curriculum` refuses or that CYCLE cannot express."""
        check_curriculum(curriculum, names)
        self.first_steps = [0, *(round(stage.until * steps) for stage in curriculum)]
        self._starts: Ints = np.array(self.first_steps) * sequences_per_batch  # of stages, then the run's end
        cycles = []
        for index, stage in enumerate(curriculum):
            counts = apportion([stage.mix.get(name, 0.0) for name in names], CYCLE)
            cycles.append(spread(counts, derive(seed, "mix", index)))
        self._cycles = np.stack(cycles)  # [stages, CYCLE] -> source
        one_hot = self._cycles[:, :, None] == np.arange(len(names))
        self._used = np.zeros((len(cycles), CYCLE + 1, len(names)), np.int64)  # by a prefix of a cycle
        np.cumsum(one_hot, axis=1, out=self._used[:, 1:])
        self._before = np.zeros((len(cycles), len(names)), np.int64)  # used by all earlier stages
        for stage_index in range(1, len(cycles)):
            self._before[stage_index] = self.counts(np.array([self._starts[stage_index]]), stage_index - 1)[0]

    def stage(self, samples: Ints) -> Ints:
        """The curriculum stage of each sample number."""
        return np.searchsorted(self._starts[1:-1], samples, side="right")

    def sources(self, samples: Ints) -> Ints:
        """The source of each sample number. [n] -> [n]"""
        stage = self.stage(samples)
        return np.asarray(self._cycles[stage, (samples - self._starts[stage]) % CYCLE])

    def counts(self, samples: Ints, stage: Ints | int | None = None) -> Ints:
        """How many samples of each source come before each sample number. [n] -> [n, sources]"""
        stage = self.stage(samples) if stage is None else stage
        cycle, place = np.divmod(samples - self._starts[stage], CYCLE)
        whole = self._used[stage, CYCLE] * cycle[:, None]
        return np.asarray(self._before[stage] + whole + self._used[stage, place])


# ---- windows -------------------------------------------------------------------------------------------


class Windows:
    """The order in which one source's windows are read: every window once in an epoch, each epoch anew."""

    def __init__(self, seed: int, name: str, count: int) -> None:
        self._count = count
        # One epoch of order takes 8 bytes a window; two are kept, for the batch where an epoch ends.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permutation(derive(seed, "windows", name, epoch), count))

    def __call__(self, k: Ints) -> Ints:
        """The window of the source's k-th sample of the run. [n] -> [n]"""
        epochs, places = np.divmod(k, self._count)
        windows = np.empty_like(k)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = self._epoch(int(epoch))[places[here]]
        return windows


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
