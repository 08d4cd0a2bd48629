"""Near-duplicates against brute force over the true sets of shingles."""

import random
import re
from itertools import combinations

import numpy as np
import pytest

from gristmill.corpus import dedup
from gristmill.corpus.config import NearDuplicateConfig

CFG = NearDuplicateConfig()
WORDS = [f"w{number}" for number in range(2000)]


def shingles(text: str, width: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + width]) for start in range(max(1, len(words) - width + 1))} if words else set()


def jaccard(left: str, right: str) -> float:
    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def variants(seed: int, num_originals: int = 25) -> list[str]:
    """Unrelated texts, and copies of each with more and more of their words changed."""
    random_ = random.Random(seed)
    texts = []
    for _ in range(num_originals):
        words = random_.choices(WORDS, k=random_.randint(60, 500))
        texts.append(" ".join(words))
        for changes in (1, 4, 12):
            copy = list(words)
            for _ in range(changes):
                copy[random_.randrange(len(copy))] = random_.choice(WORDS)
            texts.append(" ".join(copy))
    return texts


def test_estimates_are_close_to_brute_force_jaccard():
    texts = variants(1)
    found = dedup.signatures(texts, CFG)
    errors = [
        (found[i] == found[j]).mean() - jaccard(texts[i], texts[j]) for i, j in combinations(range(len(texts)), 2)
    ]
    assert np.abs(errors).max() < 0.2  # 128 permutations: standard deviation at most 0.044
    assert abs(np.mean([error for error in errors if error])) < 0.01


def test_clusters_join_what_is_clearly_near_and_nothing_that_is_clearly_far():
    texts = variants(2)
    found = dedup.clusters(dedup.signatures(texts, CFG), CFG)
    # Brute force: components of the graph of pairs at a similarity; the estimate's spread is left out on both sides.
    surely = components(
        [(i, j) for i, j in combinations(range(len(texts)), 2) if jaccard(texts[i], texts[j]) >= 0.85], len(texts)
    )
    at_most = components(
        [(i, j) for i, j in combinations(range(len(texts)), 2) if jaccard(texts[i], texts[j]) >= 0.55], len(texts)
    )
    for i, j in combinations(range(len(texts)), 2):
        if surely[i] == surely[j]:
            assert found[i] == found[j]
        if found[i] == found[j]:
            assert at_most[i] == at_most[j]
    assert len(set(surely)) < len(texts)  # the claim is not empty


def components(edges: list[tuple[int, int]], count: int) -> list[int]:
    """By flooding, not by union-find."""
    neighbours: dict[int, set[int]] = {row: set() for row in range(count)}
    for i, j in edges:
        neighbours[i].add(j)
        neighbours[j].add(i)
    names = [-1] * count
    for row in range(count):
        stack = [row] if names[row] < 0 else []
        while stack:
            current = stack.pop()
            if names[current] < 0:
                names[current] = row
                stack += neighbours[current]
    return names


def test_the_longest_of_a_cluster_stays_and_of_equals_the_first():
    clusters = np.array([0, 1, 0, 3, 1, 0])
    num_bytes = np.array([5, 7, 9, 1, 7, 9])
    assert dedup.survivors(clusters, num_bytes).tolist() == [2, 1, 2, 3, 1, 2]
    assert dedup.survivors(np.zeros(0, int), np.zeros(0, int)).tolist() == []


def test_texts_shorter_than_a_shingle_and_empty_ones_have_signatures():
    found = dedup.signatures(["one two", "one two", "three", "", "..."], CFG)
    assert found.shape == (5, CFG.num_permutations)
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()


def test_many_copies_form_one_cluster():
    texts = ["the same words again and again in a long enough text " * 3] * 600 + variants(3, 2)[::4]
    found = dedup.clusters(dedup.signatures(texts, CFG), CFG)
    assert set(found[:600].tolist()) == {0}
    assert len(set(found.tolist())) == 3


SYMBOLS = {
    "braille": [chr(0x2801 + number) for number in range(255)],
    "emoji": [chr(0x1F300 + number) for number in range(200)],
    "dice": [chr(0x2680 + number) for number in range(6)],
    "bars": ["\u258c", "\u2590"],
    "marks": [chr(0x0300 + number) for number in range(60)],
    "ascii": list("/\\|-+*#.:"),
}


@pytest.mark.parametrize("title", ["", "The same title of four words\n"])
@pytest.mark.parametrize("kind", SYMBOLS)
def test_texts_of_symbols_are_near_duplicates_only_when_they_are_alike(kind, title):
    chance = random.Random(7)
    originals = [chance.choices(SYMBOLS[kind], k=400) for _ in range(20)]
    copies = []
    for original in originals[:5]:
        copies.append(list(original))
        copies[-1][200] = chance.choice(SYMBOLS[kind])
    texts = []
    for symbols in (*originals, *copies):
        for place in range(30, len(symbols), 31):
            symbols[place] = " "
        texts.append(title + "".join(symbols))
    found = dedup.clusters(dedup.signatures(texts, CFG), CFG)
    assert found.tolist() == [*range(20), *range(5)]


def test_texts_without_words_are_not_duplicates_of_those_with_other_symbols_or_of_words():
    texts = ["".join(symbols[:2] * 100) for symbols in SYMBOLS.values()] + ["some words " * 30, "other things " * 30]
    found = dedup.clusters(dedup.signatures(texts, CFG), CFG)
    assert found.tolist() == list(range(len(texts)))


@pytest.mark.parametrize("first", [0x4E00, 0x0E01, 0x0905, 0xAC00, 0x0660])  # Chinese, Thai, Hindi, Korean, digits
def test_texts_of_scripts_without_spaces_are_told_apart_and_copies_found(first):
    chance = random.Random(first)
    letters = [chr(first + number) for number in range(9)]
    texts = ["".join(chance.choices(letters, k=500)) for _ in range(20)]
    found = dedup.clusters(dedup.signatures([*texts, texts[3] + " "], CFG), CFG)
    assert found.tolist() == [*range(20), 3]
