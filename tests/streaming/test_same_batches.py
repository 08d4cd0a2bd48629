"""The global batches of 200 steps: the same from any number of processes and threads, through kills of them."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from forked import SERVER

from gristmill.streaming import Batch, Batches, MixPhase

STEPS, SEQUENCES = 200, 8
CURRICULUM = (
    MixPhase(until=0.4, mix={"code": 3, "prose": 1}),
    MixPhase(until=0.8, mix={"code": 3, "prose": 1}, to={"prose": 1, "tiny": 2}),
    MixPhase(until=1.0, mix={"prose": 2, "tiny": 1}),
)


def open_batches(shards: Path) -> Batches:
    return Batches(shards, 16, SEQUENCES, STEPS, CURRICULUM, seed=5)


def part_of(batch: Batch) -> bytes:
    return b"".join(getattr(batch, field.name).tobytes() for field in fields(batch))


def rank(shards: Path, out: Path, first: int, rank: int, world_size: int, workers: int) -> None:
    """One process of a training: it leaves its part of each step's batch."""
    steps = range(first, STEPS)
    ahead = open_batches(shards).ahead(steps, workers, rank, world_size)
    for step, batch in zip(steps, ahead, strict=True):
        file = out / f"{step}-{rank}-of-{world_size}"
        np.savez(file.with_suffix(".part.npz"), **{field.name: getattr(batch, field.name) for field in fields(batch)})
        file.with_suffix(".part.npz").replace(file.with_suffix(".npz"))


def global_batch(out: Path, step: int) -> bytes | None:
    """The parts of a step put together, as whichever ranks finished it have left them."""
    for world_size in (1, 2, 4):
        files = [out / f"{step}-{rank}-of-{world_size}.npz" for rank in range(world_size)]
        if all(file.exists() for file in files):
            parts = [np.load(file) for file in files]
            return part_of(Batch(*(np.concatenate([part[f.name] for part in parts]) for f in fields(Batch))))
    return None


def run(shards: Path, out: Path, lives: Iterator[tuple[int, int, float | None]]) -> str:
    """Read all steps in several lives: (processes, threads of each, the share of what is left after which one of them
    is killed). The next life begins with the first step that the one before has not finished."""
    for world_size, workers, killed_after in lives:
        first = next((step for step in range(STEPS) if global_batch(out, step) is None), STEPS)
        ranks = [
            SERVER.Process(target=rank, args=(shards, out, first, number, world_size, workers))
            for number in range(world_size)
        ]
        for process in ranks:
            process.start()
        if killed_after is not None:
            until = out / f"{first + int(killed_after * (STEPS - first))}-0-of-{world_size}.npz"
            while not until.exists() and ranks[0].is_alive():
                ranks[0].join(0.001)
            for process in ranks:
                process.kill()
        for process in ranks:
            process.join()
            assert killed_after is not None or process.exitcode == 0
    found = [global_batch(out, step) for step in range(STEPS)]
    return hashlib.sha256(b"".join(batch or b"missing" for batch in found)).hexdigest()


@pytest.fixture(scope="module")
def expected(shards: Path) -> str:
    batches = open_batches(shards)
    return hashlib.sha256(b"".join(part_of(batches.batch(step)) for step in range(STEPS))).hexdigest()


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 1), (1, 4), (2, 0), (2, 3), (4, 2)])
def test_any_number_of_processes_and_threads_reads_the_same(
    processes: int, workers: int, shards: Path, expected: str, tmp_path: Path
) -> None:
    assert run(shards, tmp_path, iter([(processes, workers, None)])) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_and_changes_of_the_number_of_processes_change_nothing(
    seed: int, shards: Path, expected: str, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    lives = [(count, chance.randint(0, 4), chance.uniform(0.1, 0.5)) for count in (1, 2, 4, 2)]
    assert run(shards, tmp_path, iter([*lives, (chance.choice((1, 2, 4)), 1, None)])) == expected
