"""Claims about batches: content against a naive loop over the blocks, order against world size and resume."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from forked import SERVER

from gristmill.errors import InputError
from gristmill.stop import Stop
from gristmill.streaming import Batch, Batches, MDSReader, MDSWriter, MixPhase

EOT = 256
BLOCK = 48
STEPS = 40
CURRICULUM = (MixPhase(until=0.5, mix={"code": 3, "prose": 1}), MixPhase(until=1.0, mix={"prose": 2, "tiny": 1}))
FIELDS = ("tokens", "targets", "positions", "document_ids", "sources")


def open_batches(shards: Path, seq_len: int = 16, sequences_per_batch: int = 8) -> Batches:
    return Batches(shards, seq_len, sequences_per_batch, STEPS, CURRICULUM, seed=5)


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


@pytest.mark.parametrize("seq_len", [1, 16, BLOCK])
def test_batches_equal_a_naive_loop_over_the_blocks(shards: Path, seq_len: int) -> None:
    batches = open_batches(shards, seq_len)
    readers = [MDSReader(shards / name) for name in batches.source_names]
    for step in range(STEPS):
        batch = batches.batch(step)
        sources, windows = batches.samples(step)
        assert all(getattr(batch, field).dtype == np.int64 for field in FIELDS)
        assert np.array_equal(sources, batch.sources)
        for row, (source, window) in enumerate(zip(sources, windows, strict=True)):
            block, place = divmod(int(window) * seq_len, BLOCK)
            ids = readers[source][block]["tokens"][place : place + seq_len + 1].tolist()
            assert batch.tokens[row].tolist() == ids[:-1]
            assert batch.targets[row].tolist() == ids[1:]
            position, document = 0, 0
            for at, id in enumerate(ids[:-1]):
                if id == EOT and at > 0:
                    position, document = 0, document + 1
                assert (batch.positions[row, at], batch.document_ids[row, at]) == (position, document)
                position += 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_world_size_gives_the_same_global_batches(shards: Path, world_size: int) -> None:
    batches = open_batches(shards)
    for step in (0, 7, 19, 20, 39):
        parts = [batches.batch(step, rank, world_size) for rank in range(world_size)]
        joined = Batch(*(np.concatenate([getattr(part, field) for part in parts]) for field in FIELDS))
        assert equal(joined, batches.batch(step))


def test_stopping_and_resuming_at_any_step_gives_the_same_batches(shards: Path) -> None:
    unbroken = open_batches(shards)
    run = [unbroken.batch(step) for step in range(STEPS)]
    for resumed_at in (1, 13, 20, 33):
        resumed = open_batches(shards)  # a new process knows nothing but the step
        assert all(equal(resumed.batch(step), run[step]) for step in range(resumed_at, STEPS))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_threads_that_work_ahead_change_nothing(shards: Path, workers: int) -> None:
    steps = [3, 4, 5, 9, 7, 39]
    ahead = open_batches(shards).ahead(steps, workers, rank=1, world_size=2)
    alone = open_batches(shards)
    for step, batch in zip(steps, ahead, strict=True):
        assert equal(batch, alone.batch(step, 1, 2))


def slow_reads(patch: pytest.MonkeyPatch, step: int) -> threading.Event:
    """Reading that step ends when the event is set."""
    arrived, read = threading.Event(), Batches._read

    def slow(batches: Batches, its: int, *rest: int) -> Batch:
        if its == step:
            arrived.wait()
        return read(batches, its, *rest)

    patch.setattr(Batches, "_read", slow)
    return arrived


@pytest.mark.parametrize("workers", [1, 4])
def test_a_stop_ends_the_wait_for_a_batch_and_not_the_batches_that_are_there(
    shards: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, stop = slow_reads(monkeypatch, 6), Stop()
    ahead = open_batches(shards).ahead(range(STEPS), workers, stop=stop)
    assert all(equal(next(ahead), open_batches(shards).batch(step)) for step in range(5))
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    assert len(list(ahead)) == 1  # step 5
    assert 0.2 < time.monotonic() - started < 5
    arrived.set()


def read_one_and_leave(shards: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        slow_reads(patch, 1)
        next(open_batches(shards).ahead(range(STEPS), 1))


def test_a_batch_that_never_comes_does_not_hold_the_end_of_the_process(shards: Path) -> None:
    process = SERVER.Process(target=read_one_and_leave, args=(shards,))
    process.start()
    process.join(20)
    alive = process.is_alive()
    process.kill()
    assert not alive


def test_each_source_is_read_epoch_by_epoch_over_the_whole_run(shards: Path) -> None:
    batches = open_batches(shards)
    read: list[list[int]] = [[] for _ in batches.source_names]
    for step in range(STEPS):
        assert batches.source_counts(step) == dict(zip(batches.source_names, map(len, read), strict=True))
        for source, window in zip(*batches.samples(step), strict=True):
            read[source].append(int(window))
    assert batches.source_counts(STEPS) == dict(zip(batches.source_names, map(len, read), strict=True))
    for windows, count in zip(read, batches.num_windows, strict=True):
        for first in range(0, len(windows) - count + 1, count):
            assert sorted(windows[first : first + count]) == list(range(count))
    assert any(len(windows) > 2 * count for windows, count in zip(read, batches.num_windows, strict=True))


def test_the_curriculum_changes_at_its_step(shards: Path) -> None:
    batches = open_batches(shards)
    assert [batches.curriculum_stage(step) for step in (0, 19, 20, 39)] == [0, 0, 1, 1]
    first, second = batches.source_counts(20), batches.source_counts(40)
    assert first == {"code": 120, "prose": 40, "tiny": 0}
    assert second["code"] == 120
    assert abs(second["prose"] - 40 - 160 * 2 / 3) <= 3


def test_a_longer_context_reads_the_same_shards(shards: Path) -> None:
    short, long = open_batches(shards, 8, 6), open_batches(shards, 24, 2)
    assert [n // 3 for n in short.num_windows] == long.num_windows


def test_settings_that_do_not_fit_name_the_fix(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"seq_len=17 must divide .*48.*16"):
        open_batches(shards, 17)
    with pytest.raises(InputError, match=r"mixes 'codd'.*'code'"):
        Batches(shards, 16, 8, STEPS, (MixPhase(until=1.0, mix={"codd": 1}),), 0)
    with pytest.raises(InputError, match="ascend"):
        Batches(shards, 16, 8, STEPS, (MixPhase(until=0.9, mix={"code": 1}),), 0)
    with pytest.raises(InputError, match="holds no sources"):
        Batches(tmp_path, 16, 8, STEPS, CURRICULUM, 0)
    (tmp_path / "code").mkdir()
    for columns, samples in (({"text": "str"}, [{"text": "a"}]), ({"tokens": "ndarray", "starts": "ndarray"}, [])):
        with MDSWriter(tmp_path / "code", columns) as writer:
            for sample in samples:
                writer.write(sample)
        with pytest.raises(InputError, match="code holds no token blocks"):
            Batches(tmp_path, 16, 8, STEPS, (MixPhase(until=1.0, mix={"code": 1}),), 0)
    with pytest.raises(InputError, match="steps=0"):
        Batches(shards, 16, 8, 0, CURRICULUM, 0)
    batches = open_batches(shards)
    with pytest.raises(ValueError, match="world_size=3 must divide sequences_per_batch=8"):
        batches.batch(0, 0, 3)
    for step in (-1, STEPS):
        with pytest.raises(ValueError, match="step="):
            batches.batch(step)
