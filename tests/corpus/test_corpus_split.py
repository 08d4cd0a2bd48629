"""The split: whole groups, by rank."""

import random

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from gristmill.corpus.config import SplitConfig
from gristmill.corpus.split import assign_splits, rank
from gristmill.errors import InputError

GROUPS = st.dictionaries(
    st.text(min_size=1, max_size=6),
    st.dictionaries(st.sampled_from(("code", "prose", "notes")), st.integers(1, 10**6), min_size=1),
    min_size=3,
    max_size=60,
)
CFGS = st.builds(SplitConfig, validation=st.floats(0.001, 0.2), test=st.floats(0.001, 0.2))


@settings(max_examples=150)
@given(GROUPS, CFGS, st.randoms())
def test_each_group_has_one_split_whatever_the_order_and_each_source_keeps_training_documents(groups, cfg, random_):
    try:
        found = assign_splits(groups, cfg)
    except InputError:  # a source of one or two groups only trains, so some of these have nothing to give
        reject()
    assert set(found) == set(groups)
    assert set(found.values()) == {"train", "validation", "test"}
    for source in {source for sizes in groups.values() for source in sizes}:
        assert "train" in {found[group] for group, sizes in groups.items() if source in sizes}
    shuffled = list(groups.items())
    random_.shuffle(shuffled)
    assert assign_splits(dict(shuffled), cfg) == found


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), st.integers(1, 10**6), min_size=3, max_size=30), CFGS)
def test_a_single_source_of_three_groups_can_always_be_split(sizes, cfg):
    found = assign_splits({group: {"notes": size} for group, size in sizes.items()}, cfg)
    assert set(found.values()) == {"train", "validation", "test"}


def many(count: int = 400) -> dict[str, dict[str, int]]:
    random_ = random.Random(5)
    return {
        f"group {number}": {
            source: random_.randint(100, 20_000) for source in random_.sample(("code", "prose"), random_.randint(1, 2))
        }
        for number in range(count)
    }


def held_out(groups: dict[str, dict[str, int]], found: dict[str, str], source: str, split: str) -> float:
    total = sum(sizes.get(source, 0) for sizes in groups.values())
    return sum(sizes.get(source, 0) for group, sizes in groups.items() if found[group] == split) / total


def test_held_out_shares_reach_what_was_asked_in_each_source_and_stay_below_twice_that():
    groups = many()
    found = assign_splits(groups, SplitConfig(validation=0.03, test=0.05))
    for source in ("code", "prose"):
        assert 0.03 <= held_out(groups, found, source, "validation") <= 0.06
        assert 0.05 <= held_out(groups, found, source, "test") <= 0.10


def test_a_giant_stays_in_training_wherever_it_ranks():
    for number in range(20):
        groups = many(60) | {f"giant {number}": {"code": 50_000_000}}
        assert assign_splits(groups, SplitConfig())[f"giant {number}"] == "train"


def test_a_new_document_changes_the_rank_of_no_group():
    # Its bytes may move the line between splits; the order in which groups are asked never changes.
    groups = many(50)
    before = sorted(groups, key=rank)
    groups["group 7"]["code"] = 10**6
    assert sorted(groups, key=rank) == before


def test_three_files_are_enough_and_two_are_refused_with_the_fix():
    found = assign_splits({name: {"notes": 100} for name in ("a.md", "b.md", "c.md")}, SplitConfig())
    assert sorted(found.values()) == ["test", "train", "validation"]
    with pytest.raises(InputError, match=r"2 group.*a\.md, b\.md.*give more files"):
        assign_splits({"a.md": {"notes": 100}, "b.md": {"notes": 100}}, SplitConfig())
