"""The split into training, validation and test: whole groups, ranked by a hash of their name. Pure.

A group (a package, a repository, a folder) never lies on two sides, so that held-out text is not a neighbour's text.
The rank depends on the name alone: neither order nor content of the documents can steer a group to a side.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from gristmill.corpus.config import SplitConfig
from gristmill.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SALT = "gristmill corpus split 1"
MAX_OVER = 2.0  # a held-out split takes at most this many times its share of a source
SMALL = 0.25  # of a split's share: groups up to here are asked first, so that several make a split, not one or two


def rank(group: str) -> bytes:
    return hashlib.sha256(f"{SALT}\0{group}".encode()).digest()


def assign_splits(groups: Mapping[str, Mapping[str, int]], cfg: SplitConfig) -> dict[str, Split]:
    """Group -> split. `groups`: group -> source -> bytes of the group in it.

    Validation, then test, take groups in the order of their rank while some source in the group still lacks its share:
    first of those that are small beside the share, then, where they do not fill it, of all. A group that would bring
    any source above twice its share is passed over, so one giant cannot swallow a split. A source whose every group is
    too large for that (a small corpus) gives its smallest. Nothing is taken that a later split or training needs: each
    source keeps a group for each of them, and one of one or two groups only trains.

    Raises InputError when there are not enough groups to give each split one.
    """
    totals: Counter[str] = Counter()
    for sizes in groups.values():
        totals.update(sizes)
    found: dict[str, Split] = dict.fromkeys(groups, "train")
    remaining = {group: groups[group] for group in sorted(groups, key=rank)}
    held_out: tuple[tuple[Split, float, int], ...] = (("validation", cfg.validation, 2), ("test", cfg.test, 1))
    for split, share, num_later in held_out:
        taken = _take(remaining, {source: share * total for source, total in totals.items()}, num_later)
        if not taken:
            names = ", ".join(sorted(groups)[:3])
            raise InputError(
                f"corpus: the documents that are left form {len(groups)} group(s) ({names}…), and training, validation "
                "and test each need one of the same source; give more files or folders, or rows with a group_field of "
                "at least three values"
            )
        for group in taken:
            found[group] = split
            del remaining[group]
    return found


def _take(groups: Mapping[str, Mapping[str, int]], wanted: Mapping[str, float], num_later: int) -> list[str]:
    """What one split takes of the groups, which come in the order of their rank. `wanted`: source -> bytes.

    Of each source at least `num_later` groups are left.
    """
    taken: list[str] = []
    have: Counter[str] = Counter()  # bytes of each source
    free = Counter(source for sizes in groups.values() for source in sizes)  # groups of each source

    def take(group: str) -> None:
        taken.append(group)
        have.update(groups[group])
        free.subtract(groups[group].keys())

    def can_go(group: str) -> bool:
        return group not in taken and all(free[source] > num_later for source in groups[group])

    for largest in (SMALL, MAX_OVER):
        for group, sizes in groups.items():
            lacking = any(have[source] < wanted[source] for source in sizes)
            small = all(size <= largest * wanted[source] for source, size in sizes.items())
            fits = all(have[source] + size <= MAX_OVER * wanted[source] for source, size in sizes.items())
            if lacking and small and fits and can_go(group):
                take(group)
    for source in sorted(wanted):
        candidates = [(sizes[source], group) for group, sizes in groups.items() if source in sizes and can_go(group)]
        if not have[source] and candidates:
            take(min(candidates, key=lambda candidate: candidate[0])[1])  # of equals, the first in rank
    return taken
