"""One process as the only rank of a training."""

from gristmill.parallel.ranks import ALONE


def test_a_single_process_takes_turns_without_changing_any_state() -> None:
    before = repr(ALONE)
    for _ in range(2):
        with ALONE.turn() as mine:
            assert mine
    assert repr(ALONE) == before
