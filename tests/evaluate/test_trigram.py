import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.evaluate.trigram import Trigram

VOCAB, EOT = 13, 12


def random_documents(seed: int, count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, 11)  # ids 0-9 occur, 10 and 11 never do
    return [rng.choice(10, rng.integers(1, length), p=weights / weights.sum()).tolist() for _ in range(count)]


def by_hand(documents: list[list[int]]):  # type: ignore[no-untyped-def]
    """Interpolated modified Kneser-Ney with dictionaries, straight from the formulas."""
    counts: dict[int, Counter] = {n: Counter() for n in (1, 2, 3)}
    for document in documents:
        padded = [EOT, EOT, *document]
        for i in range(2, len(padded)):
            counts[3][tuple(padded[i - 2 : i + 1])] += 1
    for n in (2, 1):
        for gram in counts[n + 1]:
            counts[n][gram[1:]] += 1
    discounts, contexts = {}, {n: defaultdict(dict) for n in (1, 2, 3)}
    for n in (1, 2, 3):
        of = Counter(counts[n].values())
        if of[1] and of[2] and of[3]:
            y = of[1] / (of[1] + 2 * of[2])
            raw = [k - (k + 1) * y * of[k + 1] / of[k] for k in (1, 2, 3)]
            discounts[n] = [d if d > 0 else 0.5 for d in raw]
        else:
            discounts[n] = [0.5] * 3
        for gram, count in counts[n].items():
            contexts[n][gram[:-1]][gram[-1]] = count

    def probability(context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        shorter = probability(context[1:], token) if context else 1 / VOCAB
        followers = contexts[n].get(context)
        if not followers:
            return shorter
        total = sum(followers.values())
        freed = sum(discounts[n][min(count, 3) - 1] for count in followers.values())
        count = followers.get(token, 0)
        own = count - discounts[n][min(count, 3) - 1] if count else 0.0
        return own / total + freed / total * shorter

    return probability


@pytest.mark.parametrize(("count", "length"), [(40, 30), (3, 5), (1, 2)])
def test_trigram_equals_the_formulas_written_with_dictionaries(count: int, length: int) -> None:
    train, held_out = random_documents(0, count, length), [*random_documents(1, 6, 20), [10, 11, 0, 11]]
    model, probability = Trigram.train([train[:2], train[2:]], VOCAB, EOT), by_hand(train)
    for document, bits in zip(held_out, model.bits(held_out), strict=True):
        padded = [EOT, EOT, *document]
        wanted = -sum(math.log2(probability((padded[i - 2], padded[i - 1]), padded[i])) for i in range(2, len(padded)))
        assert bits == pytest.approx(wanted, rel=1e-12)


def test_probabilities_over_the_vocabulary_sum_to_one_after_any_context() -> None:
    model = Trigram.train([random_documents(2, 30, 40)], VOCAB, EOT)
    u, v, w = (x.ravel() for x in np.meshgrid(*[np.arange(VOCAB)] * 3, indexing="ij"))
    probabilities = model.probability(u, v, w).reshape(VOCAB**2, VOCAB)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-12)
    assert (probabilities > 0).all()


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=40), min_size=1, max_size=30))
def test_every_token_has_a_positive_probability_after_any_corpus(documents: list[list[int]]) -> None:
    model = Trigram.train([documents], vocab := 7, 6)
    u, v, w = (x.ravel() for x in np.meshgrid(*[np.arange(vocab)] * 3, indexing="ij"))
    probabilities = model.probability(u, v, w).reshape(vocab**2, vocab)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-12)
    assert (probabilities > 0).all()


def test_a_small_vocabulary_in_which_nearly_every_token_is_common_leaves_something_for_the_others() -> None:
    # Distinct predecessors of the tokens: 1, 2, 2, 2, 3, 3, ..., of which the formulas make discounts below 0.
    followed_by = {0: [1], 1: [2, 3, 4, 5, 6, 7, 8], 2: [2, 3, 4, 5, 6, 7, 8], 3: [5, 6, 7, 8], 4: [5, 6, 7, 8]}
    documents = [[first, second] for first, seconds in followed_by.items() for second in seconds for _ in range(9)]
    model = Trigram.train([documents], VOCAB, EOT)
    assert math.isfinite(model.bits([[10, 11, 9, 0, 0]])[0])


def test_it_learns_the_order_of_a_text_that_repeats() -> None:
    cycle = [list(range(8)) * 20]
    assert Trigram.train([cycle], VOCAB, EOT).bits([list(range(8)) * 4])[0] / 32 < 0.6 < math.log2(8)


def test_keys_of_a_large_vocabulary_do_not_overflow() -> None:
    vocab, document = 100_352, [100_350, 100_349, 100_348, 100_350, 100_349]
    model = Trigram.train([[document]], vocab, 100_351)
    wanted = model.probability(*(np.array([id]) for id in (100_350, 100_349, 100_348)))
    assert wanted[0] > 0.1
