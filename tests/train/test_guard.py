"""Which steps may change the weights, against a plain calculation over the whole history."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.train.config import GuardConfig
from gristmill.train.guard import Guard

figures = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=60)


@given(figures=figures, sigmas=st.floats(0.5, 4), window=st.integers(8, 20))
def test_a_step_far_above_the_last_ones_is_a_spike(
    figures: list[tuple[float, float]], sigmas: float, window: int
) -> None:
    guard = Guard(GuardConfig(sigmas=sigmas, window=window))
    accepted: list[tuple[float, float]] = []
    for pair in figures:
        recent = np.array(accepted[-window:])
        spike = len(recent) == window and bool(np.any(pair > recent.mean(0) + sigmas * recent.std(0) * (1 + 1e-9)))
        near = len(recent) == window and np.any(np.isclose(pair, recent.mean(0) + sigmas * recent.std(0)))
        reason = guard.judge(*pair)
        if not near:
            assert (reason is not None) == spike
        if reason is None:
            accepted.append(pair)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize(("value", "spike"), [(6.9, False), (7.1, True)])
def test_a_spike_is_above_the_mean_and_the_population_deviation_of_a_full_window(
    name: str, value: float, spike: bool
) -> None:
    """2, 4, 4, 4, 5, 5, 7, 9 have mean 5 and deviation 2: the limit is 7. A sample's deviation would be 2.14. The 9 is
    far above the seven values before it, but these do not fill the window."""
    guard = Guard(GuardConfig(sigmas=1.0, window=8))
    for recent in (2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0):
        assert guard.judge(**({"loss": 1.0, "grad_norm": 1.0} | {name: recent})) is None
    reason = guard.judge(**({"loss": 1.0, "grad_norm": 1.0} | {name: value}))
    assert reason == (f"{name} 7.1 is a spike: above 7" if spike else None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["loss", "grad_norm"])
def test_what_is_no_number_is_always_refused_and_named(bad: float, which: str) -> None:
    guard = Guard(GuardConfig())
    reason = guard.judge(**({"loss": 2.0, "grad_norm": 1.0} | {which: bad}))
    assert reason is not None
    assert which in reason
    assert str(bad) in reason
    assert guard.judge(2.0, 1.0) is None


def test_spikes_pass_unless_they_are_asked_for() -> None:
    guard = Guard(GuardConfig(window=8))
    assert all(guard.judge(loss, 1.0) is None for loss in [1.0] * 20 + [1e9])


@given(skipped=st.sets(st.integers(0, 12)), step=st.integers(0, 12), in_a_row=st.integers(1, 4))
def test_too_many_means_so_many_in_a_row_that_end_here(skipped: set[int], step: int, in_a_row: int) -> None:
    guard = Guard(GuardConfig(in_a_row=in_a_row))
    for its in skipped:
        guard.skip(its)
    row = 0
    while step - row in skipped:
        row += 1
    assert guard.too_many(step) == (row >= in_a_row)


@given(before=figures, after=figures, skipped=st.sets(st.integers(0, 50)))
def test_a_guard_that_went_through_json_judges_alike(
    before: list[tuple[float, float]], after: list[tuple[float, float]], skipped: set[int]
) -> None:
    cfg = GuardConfig(sigmas=2.0, window=8)
    guard, again, used = Guard(cfg), Guard(cfg), Guard(cfg)
    for pair in before:
        guard.judge(*pair)
    for step in skipped:
        guard.skip(step)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.skipped == guard.skipped
    for pair in after:  # a guard that goes back to a checkpoint forgets what came after it
        used.judge(*pair)
    used.load(guard.state())
    assert used.state() == guard.state()
    assert [again.judge(*pair) for pair in after] == [guard.judge(*pair) for pair in after]
