"""What needs no neural network: a general compressor and a trigram, on the very bytes that the model is scored on."""

import lzma
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from gristmill.evaluate.bits_per_byte import per_source
from gristmill.evaluate.documents import Document, open_split, read_texts
from gristmill.evaluate.trigram import Trigram
from gristmill.progress import bar, track

if TYPE_CHECKING:
    from gristmill.tokenizer import Tokenizer

PRESET = 9 | lzma.PRESET_EXTREME
MIN_DICTIONARY, MAX_DICTIONARY = 1 << 12, 1 << 26  # xz's smallest, and that of preset 9


def xz_bytes(data: bytes) -> int:
    """Length of what `xz -9e` makes of `data`, container included.

    A dictionary longer than the data changes no match, but preset 9 clears hundreds of megabytes for it each time;
    one just as long gives the same length, some fifty times as fast on short documents.
    """
    dictionary = min(max(MIN_DICTIONARY, 1 << max(0, len(data) - 1).bit_length()), MAX_DICTIONARY)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": PRESET, "dict_size": dictionary}]
    return len(lzma.compress(data, filters=filters))


def xz_each(documents: Sequence[Document]) -> dict[str, float]:
    """Bits per byte when each document is compressed alone."""
    with ThreadPoolExecutor() as pool:  # lzma releases the interpreter's lock
        sizes = pool.map(lambda document: xz_bytes(document.text.encode()), documents)
        return per_source(documents, [8.0 * size for size in track(sizes, "xz of each document", len(documents))])


def xz_whole(documents: Sequence[Document]) -> dict[str, float]:
    """Bits per byte of one file with all documents, and of one file with each source's."""
    figures = {}
    for name in track(["all", *sorted({document.source for document in documents})], "xz of the whole"):
        data = b"".join(document.text.encode() for document in documents if name in ("all", document.source))
        figures[name] = 8.0 * xz_bytes(data) / len(data)
    return figures


def trigram(documents: Sequence[Document], corpus: Path, tokenizer: "Tokenizer") -> dict[str, float]:
    """Bits per byte of a trigram over the same tokens, counted on the whole train split."""

    def batches() -> Iterator[list[list[int]]]:
        for texts in read_texts(corpus, "train"):
            yield tokenizer.encode_batch(texts)
            advance(len(texts))

    with bar("counting trigrams", open_split(corpus, "train").metadata.num_rows) as advance:
        model = Trigram.train(batches(), tokenizer.vocab_size, tokenizer.eot_id)
    return per_source(documents, model.bits(tokenizer.encode_batch([document.text for document in documents])))
