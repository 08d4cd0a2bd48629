"""Bits per byte: what a model would need to store held-out text, whatever its tokenizer."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from gristmill.errors import InputError
from gristmill.evaluate.documents import Document
from gristmill.evaluate.scorer import Scorer

if TYPE_CHECKING:
    from gristmill.tokenizer import Tokenizer

CHUNK_BYTES = 1 << 18  # scored in one call: enough to fill the scorer's batches, small enough to show progress


def bits_per_byte(
    documents: Sequence[Document],
    scorer: Scorer,
    tokenizer: "Tokenizer",
    advance: Callable[[float], None] = lambda num_bytes: None,
) -> dict[str, float]:
    """-log2 p of all tokens of the documents / their UTF-8 bytes: under "all", and under each source's name.

    Each document is predicted from `<|endoftext|>` on; the `<|endoftext|>` after it is not part of its bytes.
    `advance` is told how many bytes were scored.
    """
    bits: list[float] = []
    for chunk in _chunks(documents):
        sequences = [[tokenizer.eot_id, *ids] for ids in tokenizer.encode_batch([document.text for document in chunk])]
        bits += [-nats / math.log(2) for nats in scorer.loglikelihood(sequences)]
        advance(sum(document.num_bytes for document in chunk))
    return per_source(documents, bits)


def per_source(documents: Sequence[Document], bits: Iterable[float]) -> dict[str, float]:
    """Total bits over total bytes, of all documents and of each source's. Raises InputError without a byte."""
    rows = list(zip(documents, bits, strict=True))
    figures = {}
    for name in ["all", *sorted({document.source for document in documents})]:
        group = [(document, cost) for document, cost in rows if name in ("all", document.source)]
        num_bytes = sum(document.num_bytes for document, _ in group)
        if not num_bytes:
            raise InputError("held-out documents are empty: bits per byte needs at least one byte")
        figures[name] = math.fsum(cost for _, cost in group) / num_bytes
    return figures


def _chunks(documents: Sequence[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.num_bytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
