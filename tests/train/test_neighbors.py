"""Training's threads sleep while neighbors take their CPU time, and now and then try whether they are still there."""

from hypothesis import given
from hypothesis import strategies as st

from gristmill.train.neighbors import LONGEST_REST, Neighbors


def decisions(shares: list[float]) -> str:
    """A letter for each period: whether its threads sleep."""
    neighbors, made = Neighbors(2), ""
    for share in shares:
        made += "s" if neighbors.sleeps_after(share) else "."
    return made


def test_an_undisturbed_training_always_spins() -> None:
    assert decisions([0.97] * 50) == "." * 50


def test_one_disturbed_period_is_followed_by_two_that_sleep_and_then_threads_spin() -> None:
    assert decisions([0.97, 0.6, 0.5, 0.5, 0.97, 0.97]) == ".ss..."


def test_each_failed_trial_doubles_the_rest_up_to_a_limit() -> None:
    runs = decisions([0.5] * 2000).split(".")
    lengths = [len(run) for run in runs if run]
    assert lengths[:9] == [2, 4, 8, 16, 32, 64, 128, 256, LONGEST_REST]


@given(st.lists(st.floats(0, 2), max_size=400))
def test_threads_never_sleep_longer_than_the_longest_rest_without_a_trial(shares: list[float]) -> None:
    assert max(map(len, decisions(shares).split("."))) <= LONGEST_REST
