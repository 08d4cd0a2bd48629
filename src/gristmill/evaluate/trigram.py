"""A token trigram: what counting alone achieves on the same text, the floor that a trained model must beat.

Interpolated Kneser-Ney with three discounts an order ("modified"), after Chen and Goodman, "An Empirical Study of
Smoothing Techniques for Language Modeling" (1998), section 3. Here the unigrams are further interpolated with the
uniform distribution, so that no token of the vocabulary has probability 0, and probabilities sum to 1 exactly as
they stand. numpy alone: n-grams are 64-bit keys in sorted arrays, so 10M tokens take some 3 seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """The n-grams of one length. Key of an n-gram = key of its context * vocab_size + its last token.

    `left` is the probability that a context's discounts free for the next shorter context.
    """

    vocab_size: int
    grams: Ints  # [N] sorted, distinct
    counts: Ints  # [N]
    contexts: Ints  # [C] sorted, distinct
    totals: Ints  # [C]
    left: Floats  # [C]
    discounts: Floats  # [4], by count: 0, 1, 2, 3 or more

    @classmethod
    def of(cls, vocab_size: int, grams: Ints, counts: Ints) -> "Level":
        contexts, first = np.unique(grams // vocab_size, return_index=True)
        totals = np.add.reduceat(counts, first)
        discounts = _discounts(counts)
        freed = np.add.reduceat(discounts[np.minimum(counts, 3)], first)
        return cls(vocab_size, grams, counts, contexts, totals, freed / totals, discounts)

    def probability(self, contexts: Ints, tokens: Ints, shorter: Floats) -> Floats:
        """p(token | context), given p(token | shorter context); all of shape [T]."""
        place, known = _find(self.contexts, contexts)
        gram, seen = _find(self.grams, contexts * self.vocab_size + tokens)
        counts = np.where(seen, self.counts[gram], 0)
        own = (counts - self.discounts[np.minimum(counts, 3)]) / self.totals[place]
        return np.asarray(np.where(known, own + self.left[place] * shorter, shorter))


@dataclass(frozen=True)
class Trigram:
    vocab_size: int
    eot_id: int
    unigram: Floats  # [V] p(token), its sum is 1
    bigrams: Level
    trigrams: Level

    @classmethod
    def train(cls, batches: Iterable[Sequence[Sequence[int]]], vocab_size: int, eot_id: int) -> "Trigram":
        """Count documents, given in batches of id sequences without `<|endoftext|>`."""
        keys = []
        for batch in batches:
            u, v, w = _stream(batch, eot_id)
            keys.append((u * vocab_size + v) * vocab_size + w)
        grams, counts = np.unique(np.concatenate(keys), return_counts=True)
        # Kneser-Ney: a shorter n-gram counts the distinct tokens seen before it, not its occurrences
        bigrams, bigram_counts = np.unique(grams % vocab_size**2, return_counts=True)
        preceded = np.bincount(bigrams % vocab_size, minlength=vocab_size)
        return cls(
            vocab_size,
            eot_id,
            _unigram(preceded),
            Level.of(vocab_size, bigrams, bigram_counts),
            Level.of(vocab_size, grams, counts),
        )

    def probability(self, u: Ints, v: Ints, w: Ints) -> Floats:
        """p(w | u v), each of shape [T]."""
        shorter = self.bigrams.probability(v, w, self.unigram[w])
        return self.trigrams.probability(u * self.vocab_size + v, w, shorter)

    def bits(self, documents: Sequence[Sequence[int]]) -> list[float]:
        """-log2 p of each document's tokens, the first one after `<|endoftext|>`."""
        cost = -np.log2(self.probability(*_stream(documents, self.eot_id)))
        ends = np.cumsum([len(document) for document in documents])
        return [float(part.sum()) for part in np.split(cost, ends[:-1])]


def _stream(documents: Sequence[Sequence[int]], eot_id: int) -> tuple[Ints, Ints, Ints]:
    """For each token of the documents, in order: the two before it (`<|endoftext|>` at the start), and itself."""
    size = sum(len(document) + 2 for document in documents)
    stream = np.fromiter((id for document in documents for id in (eot_id, eot_id, *document)), np.int64, size)
    inside = stream[2:] != eot_id  # text never encodes to a special id
    return stream[:-2][inside], stream[1:-1][inside], stream[2:][inside]


def _find(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """A valid index for each wanted key, and whether the key is there."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted


def _discounts(counts: Ints) -> Floats:
    """Return Chen and Goodman's D1, D2, D3+ from the counts of counts, and 1/2 where the sample is too small to tell.

    Every discount is above 0. Otherwise nothing would be left for unseen tokens, whose probability would be 0: in a
    small corpus with a small vocabulary, few tokens are rare and the formulas can turn negative.
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    discounts[1:][discounts[1:] <= 0] = 0.5
    return discounts


def _unigram(counts: Ints) -> Floats:
    discounts = _discounts(counts[counts > 0])[np.minimum(counts, 3)]
    return np.asarray((counts - discounts + discounts.sum() / len(counts)) / counts.sum())
