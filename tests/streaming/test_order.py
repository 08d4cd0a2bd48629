"""Claims about the order of samples, against brute force: a loop that walks the whole run."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.streaming.order import (
    CYCLE,
    OPEN_SHARDS,
    RAMP_PIECES,
    MixPhase,
    Order,
    Windows,
    apportion,
    boundaries,
    check_curriculum,
    derive,
    pieces,
    shuffled,
    splitmix64,
    spread,
)

NAMES = ["code", "prose", "web"]
CURRICULUM = (
    MixPhase(until=0.3, mix={"code": 1.0}),
    MixPhase(until=0.75, mix={"code": 0.5, "prose": 0.3, "web": 0.2}),
    MixPhase(until=1.0, mix={"web": 2, "prose": 1}),
)


def test_splitmix64_is_the_published_generator() -> None:
    # the first outputs for seed 1234567, from the reference implementation's test vectors
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = (1234567 + np.arange(4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    assert splitmix64(states).tolist() == published


def test_the_order_of_a_seed_never_changes() -> None:
    assert derive(7, "windows", "code", 0) == 9465596667565756243
    assert shuffled(derive(7, "windows", "code", 0), np.arange(10)).tolist() == [9, 7, 4, 1, 5, 2, 6, 8, 0, 3]


@given(key=st.integers(0, 2**64 - 1), count=st.integers(1, 300))
def test_a_permutation_holds_every_number_once(key: int, count: int) -> None:
    assert sorted(shuffled(key, np.arange(count)).tolist()) == list(range(count))


def test_permutations_are_uniform_and_differ_between_keys() -> None:
    seen = Counter(tuple(shuffled(derive(0, i), np.arange(4)).tolist()) for i in range(2400))
    assert len(seen) == 24
    assert sum((n - 100) ** 2 / 100 for n in seen.values()) < 55  # chi-squared, 23 degrees: p = 0.0002


weights = st.lists(st.floats(0.01, 1) | st.just(0.0), min_size=1, max_size=6).filter(lambda w: sum(w) > 0)


@given(weights=weights)
def test_apportioned_counts_are_within_one_of_the_exact_share(weights: list[float]) -> None:
    counts = apportion(weights, CYCLE)
    assert sum(counts) == CYCLE
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - CYCLE * weight / sum(weights)) < 1 + 1e-6
        assert (count > 0) == (weight > 0)


def test_a_weight_too_small_for_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="raise it or set it to 0"):
        apportion([1.0, 1e-5], CYCLE)


@given(counts=st.lists(st.integers(0, 400), min_size=1, max_size=5).filter(sum), key=st.integers(0, 2**64 - 1))
def test_every_prefix_of_a_mix_is_near_its_share(counts: list[int], key: int) -> None:
    sequence = spread(counts, key)
    assert np.bincount(sequence, minlength=len(counts)).tolist() == counts
    for source, count in enumerate(counts):
        prefix = np.cumsum(sequence == source)
        exact = np.arange(1, len(sequence) + 1) * count / len(sequence)
        assert np.abs(prefix - exact).max() <= len(counts)


@settings(max_examples=30)
@given(steps=st.integers(1, 60), batch=st.integers(1, 400), seed=st.integers(0, 5))
def test_sources_and_counts_equal_a_walk_through_the_run(steps: int, batch: int, seed: int) -> None:
    order = Order(CURRICULUM, NAMES, steps, batch, seed)
    samples = np.arange(steps * batch)
    sources, counts = order.sources(samples), order.counts(samples)
    used = [0, 0, 0]
    for g in range(0, len(samples)):
        assert counts[g].tolist() == used
        used[sources[g]] += 1
    assert order.counts(np.array([len(samples)]))[0].tolist() == used
    rng = np.random.default_rng(seed)
    some = rng.integers(0, len(samples), 20)  # any samples, in any order, alone
    assert np.array_equal(order.sources(some), sources[some])


def test_a_stage_begins_at_its_fraction_of_the_steps_and_mixes_its_sources() -> None:
    steps, batch = 1000, 64
    order = Order(CURRICULUM, NAMES, steps, batch, seed=3)
    sources = order.sources(np.arange(steps * batch)).reshape(steps, batch)
    stages = order.phase(np.arange(steps) * batch)
    assert stages.tolist() == [0] * 300 + [1] * 450 + [2] * 250
    for stage, (first, last) in enumerate([(0, 300), (300, 750), (750, 1000)]):
        mix = np.array([CURRICULUM[stage].mix.get(name, 0) for name in NAMES])
        share = np.bincount(sources[first:last].ravel(), minlength=3) / ((last - first) * batch)
        assert np.allclose(share, mix / mix.sum(), atol=2 / CYCLE + 3 / ((last - first) * batch))
        for step in range(first, last):  # each single batch is near the mix too
            assert np.abs(np.bincount(sources[step], minlength=3) - batch * mix / mix.sum()).max() <= 6


@given(shards=st.lists(st.integers(1, 9), min_size=1, max_size=3 * OPEN_SHARDS), epochs=st.integers(1, 3))
def test_every_window_comes_once_per_epoch_in_a_new_order(shards: list[int], epochs: int) -> None:
    count = sum(shards)
    windows = Windows(0, "code", shards)
    order = windows(np.arange(epochs * count))
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    backwards = [int(windows(np.array([k]))[0]) for k in reversed(range(epochs * count))]
    assert backwards[::-1] == order.tolist()
    if count >= 20 and epochs > 1:
        assert order[:count].tolist() != order[count : 2 * count].tolist()
        assert order.tolist() != Windows(0, "prose", shards)(np.arange(epochs * count)).tolist()
        assert order.tolist() != Windows(1, "code", shards)(np.arange(epochs * count)).tolist()


@given(shards=st.lists(st.integers(1, 9), min_size=1, max_size=4 * OPEN_SHARDS))
def test_an_epoch_finishes_a_few_shards_before_it_opens_others(shards: list[int]) -> None:
    shard_of = np.repeat(np.arange(len(shards)), shards)[Windows(3, "code", shards)(np.arange(sum(shards)))]
    first, last = ([order.tolist().index(i) for i in range(len(shards))] for order in (shard_of, shard_of[::-1]))
    for at in range(len(shard_of)):
        begun = sum(start <= at < len(shard_of) - end for start, end in zip(first, last, strict=True))
        assert begun <= OPEN_SHARDS


def shards_in_turn(seed: int, name: str, epoch: int) -> list[set[int]]:
    """Of 40 shards with three windows each: the first eight that are open together, the next eight, and so on."""
    shard_of = Windows(seed, name, [3] * 40)(120 * epoch + np.arange(120)) // 3
    return [set(group.tolist()) for group in shard_of.reshape(5, 24)]


def test_each_epoch_source_and_seed_opens_other_shards_together() -> None:
    turns = [shards_in_turn(*of) for of in ((0, "code", 0), (0, "code", 1), (0, "prose", 0), (1, "code", 0))]
    for turn in turns:
        assert [len(group) for group in turn] == [OPEN_SHARDS] * 5
        assert set.union(*turn) == set(range(40))
    assert not any(group in turns[0] for other in turns[1:] for group in other)


def test_each_epoch_source_and_seed_reads_the_windows_of_the_same_shards_in_another_order() -> None:
    """Eight shards are open together from the start, so their own order does not matter here."""
    count = 8 * OPEN_SHARDS
    orders = [
        Windows(seed, name, [8] * OPEN_SHARDS)(epoch * count + np.arange(count)).tolist()
        for seed, name, epoch in ((0, "code", 0), (0, "code", 1), (0, "prose", 0), (1, "code", 0))
    ]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_windows_of_open_shards_are_well_mixed() -> None:
    order = Windows(0, "code", [100] * OPEN_SHARDS * 2)(np.arange(1600))
    for group in (order[:800], order[800:]):
        steps = np.abs(np.diff(group // 100))  # from shard to shard, at random: no runs in one shard
        assert (steps == 0).mean() < 0.2
        halves = np.bincount(group[:400] // 100, minlength=16)
        assert halves[halves > 0].min() >= 30  # of 50 expected


@pytest.mark.parametrize("batch", [1, 64])
def test_a_ramp_passes_evenly_from_one_mix_to_the_other(batch: int) -> None:
    ramp = MixPhase(until=0.75, mix={"code": 1.0}, to={"code": 1.0, "prose": 3.0})
    curriculum = (MixPhase(until=0.25, mix={"code": 1}), ramp, MixPhase(until=1.0, mix={"web": 1}))
    steps = 64_000 // batch
    order = Order(curriculum, NAMES, steps, batch, seed=1)
    samples = np.arange(steps * batch)
    sources = order.sources(samples)
    assert order.phase(samples).tolist() == [0] * 16_000 + [1] * 32_000 + [2] * 16_000
    prose = (sources == NAMES.index("prose"))[16_000:48_000].reshape(32, 1000).mean(1)
    # the weight of prose grows evenly, its share of all with it: 3t of 1 + 3t
    t = (np.arange(32) + 0.5) / 32
    assert np.allclose(prose, 3 * t / (1 + 3 * t), atol=0.03)
    assert prose[0] < 0.08
    assert prose[-1] > 0.72
    used = np.cumsum(sources[:, None] == np.arange(3), axis=0)
    assert np.array_equal(order.counts(samples)[1:], used[:-1])


def test_the_pieces_of_a_ramp_have_the_mixes_in_their_middles() -> None:
    """So the mean of a ramp is the mean of its ends, and a ramp up mirrors a ramp down."""
    curriculum = (MixPhase(until=0.5, mix={"code": 1.0}, to={"prose": 1.0}), MixPhase(until=1.0, mix={"web": 1.0}))
    cut = pieces(curriculum)
    assert [until for _, until, _ in cut] == pytest.approx([(i + 1) / 128 for i in range(64)] + [1.0])
    prose = [mix.get("prose", 0.0) for _, _, mix in cut[:64]]
    assert prose == pytest.approx([(i + 0.5) / 64 for i in range(64)])
    assert [mix.get("code", 0.0) for _, _, mix in cut[:64]] == pytest.approx(prose[::-1])


def test_a_ramp_to_a_small_weight_begins_where_the_weight_fills_a_cycle() -> None:
    """The first pieces would give prose less than one sample in 4,096."""
    order = Order((MixPhase(until=1.0, mix={"code": 1.0}, to={"code": 1.0, "prose": 0.01}),), NAMES, 64, CYCLE, seed=0)
    prose = (order.sources(np.arange(64 * CYCLE)).reshape(64, CYCLE) == NAMES.index("prose")).sum(1)
    assert prose[0] == 0
    assert prose[-1] == round(CYCLE * 0.01 * 63.5 / 64 / (1 + 0.01 * 63.5 / 64))


def test_a_stage_ends_at_the_step_nearest_to_its_fraction() -> None:
    """0.29 of 100 steps are 28.999999999999996 in floating point."""
    curriculum = (MixPhase(until=0.29, mix={"code": 1}), MixPhase(until=1.0, mix={"web": 1}))
    assert Order(curriculum, NAMES, 100, 4, seed=0).phase(np.arange(100) * 4).tolist() == [0] * 29 + [1] * 71


def test_each_seed_and_each_stage_mixes_the_same_sources_in_another_order() -> None:
    mix = {"code": 1.0, "prose": 1.0}
    curriculum = (MixPhase(until=0.5, mix=mix), MixPhase(until=1.0, mix=mix))
    first, other = (Order(curriculum, NAMES, 2, CYCLE, seed).sources(np.arange(2 * CYCLE)) for seed in (0, 1))
    assert first[:CYCLE].tolist() != first[CYCLE:].tolist()
    assert first.tolist() != other.tolist()


def test_a_ramp_of_fewer_steps_than_pieces_is_a_ramp_still() -> None:
    order = Order((MixPhase(until=1.0, mix={"code": 1}, to={"prose": 1}),), NAMES, RAMP_PIECES // 8, 200, seed=0)
    prose = (order.sources(np.arange(1600)) == 1).reshape(8, 200).mean(1)
    assert np.all(np.diff(prose) > 0)


@given(data=st.data(), rows=st.integers(1, 4), length=st.integers(1, 30))
def test_positions_and_document_ids_equal_a_loop(data: st.DataObject, rows: int, length: int) -> None:
    starts = [sorted(data.draw(st.sets(st.integers(0, length - 1)))) for _ in range(rows)]
    positions, document_ids = boundaries([np.array(row, np.int64) for row in starts], length)
    for row in range(rows):
        position, document = 0, 0
        for at in range(length):
            if at in starts[row] and at > 0:
                position, document = 0, document + 1
            assert (positions[row, at], document_ids[row, at]) == (position, document)
            position += 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "ascend"),
        ([0.5], "last must be 1.0"),
        ([0.5, 0.5, 1.0], "ascend"),
        ([1.0, 0.5], "ascend"),
    ],
)
def test_a_curriculum_that_does_not_fill_the_run_is_refused(stages: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^curriculum .*{message}"):
        check_curriculum([MixPhase(until=until, mix={"code": 1}) for until in stages])


def test_unknown_sources_and_impossible_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown sources \['codd'\]"):
        check_curriculum([MixPhase(until=1.0, mix={"codd": 1})], NAMES)
    for mix in ({}, {"code": 0.0}, {"code": -1.0, "prose": 2.0}, {"code": float("nan")}, {"code": float("inf")}):
        with pytest.raises(ValueError, match=r"^mix="):
            MixPhase(until=1.0, mix=mix)
    for until in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"^until="):
            MixPhase(until=until, mix={"code": 1})
