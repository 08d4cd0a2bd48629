"""Reads a corpus' splits. A capped split is a fixed subset, drawn by hash, with every source's share kept."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow.parquet as pq

from gristmill.errors import InputError

Split = Literal["train", "validation", "test"]


class Document(NamedTuple):
    id: str
    source: str
    text: str
    num_bytes: int  # of UTF-8


def read_documents(corpus: Path, split: Split, max_bytes: int | None = None) -> list[Document]:
    """The split's documents in the corpus' order; with `max_bytes`, about so many bytes of them.

    Raises InputError when the split has no document.
    """
    with open_split(corpus, split) as table:
        chosen = _draw(table, max_bytes)
        documents = [document for row, document in enumerate(_rows(table)) if row in chosen]
    if not documents:
        raise InputError(
            f"{corpus} has no {split} documents: give the corpus more groups (packages, repositories, folders), "
            f"or a larger share for {split}"
        )
    return documents


def read_texts(corpus: Path, split: Split) -> Iterator[list[str]]:
    """All texts of a split, some hundred at a time."""
    with open_split(corpus, split) as table:
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            yield batch.column("text").to_pylist()


def open_split(corpus: Path, split: Split) -> pq.ParquetFile:
    path = corpus / f"documents-{split}.parquet"
    if not path.is_file():
        raise InputError(f"{corpus} is not a corpus: it has no {path.name}")
    return pq.ParquetFile(path)


def _draw(table: pq.ParquetFile, max_bytes: int | None) -> set[int]:
    """Row numbers: of each source, documents in the order of their hashes until its share of `max_bytes` is full."""
    columns = table.read(columns=["id", "source", "num_bytes"])
    ids, sources, sizes = (columns.column(name).to_pylist() for name in ("id", "source", "num_bytes"))
    total = sum(sizes)
    if max_bytes is None or total <= max_bytes:
        return set(range(len(ids)))
    source_bytes: dict[str, int] = defaultdict(int)
    for source, size in zip(sources, sizes, strict=True):
        source_bytes[source] += size
    taken: dict[str, int] = defaultdict(int)
    chosen = set()
    for row in sorted(range(len(ids)), key=lambda row: rank(ids[row])):
        source = sources[row]
        if taken[source] < max_bytes * source_bytes[source] / total:
            taken[source] += sizes[row]
            chosen.add(row)
    return chosen


def rank(id: str) -> bytes:
    """A fixed pseudo-random order of ids."""
    return hashlib.sha256(id.encode()).digest()


def _rows(table: pq.ParquetFile) -> Iterator[Document]:
    for batch in table.iter_batches(batch_size=1024, columns=["id", "source", "text", "num_bytes"]):
        columns = (batch.column(name).to_pylist() for name in ("id", "source", "text", "num_bytes"))
        for row in zip(*columns, strict=True):
            yield Document(*row)
