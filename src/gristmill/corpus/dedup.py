"""Near-duplicates: MinHash signatures (through `rensa`), candidate pairs by banding, clusters by union-find.

The method is Broder's ("On the resemblance and containment of documents", 1997) with the banding of Leskovec,
Rajaraman and Ullman (Mining of Massive Datasets, chapter 3). Pure functions over arrays.

Of a cluster the longest document stays (of equally long ones, the first in the corpus's order): it says most of what
the others say. Because one survivor is left of each cluster, no cluster can lie on both sides of the split.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import rensa

from gristmill.corpus.config import NearDuplicateConfig

SEED = 0x67726973  # fixed: signatures are part of what makes a corpus repeatable
WORD = re.compile(r"\w+")
CHARS_PER_WORD = 5
RECALL = 0.99  # wanted chance that banding finds a pair that lies at the threshold
PAIRS_AT_ONCE = 256


def shingle_hashes(texts: Sequence[str], num_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of each run of `num_words` consecutive words, flat [H], and offsets [D + 1] into it.

    Words are lower case, so that a rename of the license header's capitals changes nothing. A text with fewer words
    has one shingle of all of them. A text that consists mostly of other characters (Braille, emoji, drawings) has
    shingles of characters instead, about as long.
    """
    words = [WORD.findall(text.lower()) for text in texts]
    hashed = rensa.RMinHash.hash_token_sets(words)
    shingles, lengths = [], []
    for text, found, hashes_of_words in zip(texts, words, hashed, strict=True):
        solid = "".join(text.lower().split())
        if sum(map(len, found)) * 2 < len(solid):
            hashes = np.frombuffer(solid.encode("utf-32-le"), "<u4").astype(np.uint64)
            width = min(num_words * CHARS_PER_WORD, len(hashes))
        else:
            hashes = np.array(hashes_of_words, np.uint64)
            width = min(num_words, len(hashes))
        rolled = np.zeros(len(hashes) - width + 1 if width else 0, np.uint64)
        for offset in range(width):
            # An odd multiplier keeps the order of the words in the sum, and the sum wraps.
            rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(rolled)]
        shingles.append(rolled)
        lengths.append(len(rolled))
    flat = np.concatenate(shingles) if shingles else np.zeros(0, np.uint64)
    return flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)


def signatures(texts: Sequence[str], cfg: NearDuplicateConfig) -> np.ndarray:
    """MinHash signatures, uint32 [D, num_permutations]: the share of equal entries of two estimates their Jaccard."""
    if not texts:
        return np.zeros((0, cfg.num_permutations), np.uint32)
    flat, offsets = shingle_hashes(texts, cfg.shingle_words)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, cfg.num_permutations, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def band_rows(cfg: NearDuplicateConfig) -> int:
    """The most entries per band with which a pair at the threshold still shares a band with probability RECALL."""
    best = 1
    for rows in range(1, cfg.num_permutations + 1):
        if 1 - (1 - cfg.threshold**rows) ** (cfg.num_permutations // rows) >= RECALL:
            best = rows
    return best


def clusters(signatures_DP: np.ndarray, cfg: NearDuplicateConfig) -> np.ndarray:
    """Cluster of each document, int64 [D], named by its first member.

    Two documents are joined when they share a band and the estimate of their similarity reaches the threshold; a
    cluster is what such pairs connect.
    """
    parents = np.arange(len(signatures_DP))

    def find(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = int(parents[row])
        return row

    for members in _buckets(signatures_DP, band_rows(cfg)):
        roots = np.array([find(int(row)) for row in members])
        if (roots == roots[0]).all():
            continue
        for left, right in _similar(signatures_DP[members], cfg.threshold):
            a, b = find(int(members[left])), find(int(members[right]))
            parents[max(a, b)] = min(a, b)
    return np.array([find(row) for row in range(len(parents))], np.int64)


def _buckets(signatures_DP: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Groups of two or more documents that agree in one whole band."""
    for start in range(0, signatures_DP.shape[1] - rows + 1, rows):
        band = np.ascontiguousarray(signatures_DP[:, start : start + rows])
        keys = band.view(np.dtype((np.void, 4 * rows)))[:, 0]
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
        yield from (members for members in np.split(order, cuts) if len(members) > 1)


def _similar(signatures_MP: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose estimated similarity reaches the threshold."""
    for left in range(len(signatures_MP) - 1):
        for start in range(left + 1, len(signatures_MP), PAIRS_AT_ONCE):
            estimates = (signatures_MP[start : start + PAIRS_AT_ONCE] == signatures_MP[left]).mean(1)
            yield from ((left, start + int(right)) for right in np.flatnonzero(estimates >= threshold))


def survivors(cluster_D: np.ndarray, num_bytes_D: np.ndarray) -> np.ndarray:
    """The document that stays in place of each one, int64 [D]: itself, or its cluster's longest (then first)."""
    order = np.lexsort((np.arange(len(cluster_D)), -num_bytes_D, cluster_D))
    firsts = order[np.r_[True, cluster_D[order][1:] != cluster_D[order][:-1]]] if len(order) else order
    by_cluster = dict(zip(cluster_D[firsts].tolist(), firsts.tolist(), strict=True))
    return np.array([by_cluster[cluster] for cluster in cluster_D.tolist()], np.int64)
