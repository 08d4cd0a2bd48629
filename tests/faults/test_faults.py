"""A short form of the campaign (`make faults`): every kind of fault, a few times."""

import os
from collections.abc import Iterator

import network
import pytest
from campaign import Campaign, write_recipe

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    work = tmp_path_factory.mktemp("faults")
    return Campaign(work, write_recipe(work))


def test_kill_9_in_and_out_of_saves_changes_nothing(campaign: Campaign) -> None:
    tally = campaign.kills(6, ranks=1)
    assert tally.while_saving >= 2


def test_kill_9_of_a_rank_ends_the_other_and_changes_nothing(campaign: Campaign) -> None:
    campaign.kills(1, ranks=2)


@pytest.mark.parametrize("kind", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(campaign: Campaign, kind: str) -> None:
    campaign.damage(kind, 1)


def test_signals_at_any_moment_save_and_change_nothing(campaign: Campaign) -> None:
    campaign.signals(3)


def test_a_rank_that_is_cut_off_is_named_and_ends_itself(campaign: Campaign) -> None:
    if problem := network.missing():
        if "namespaces" in os.environ.get("GRISTMILL_REQUIRE", "").split(","):
            pytest.fail(f"GRISTMILL_REQUIRE names namespaces: {problem}")
        pytest.skip(problem)
    campaign.cut_off_rank()


def test_any_number_of_processes_goes_on_where_another_was(campaign: Campaign) -> None:
    campaign.other_world_sizes()
