from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer

CODE = '''"""A module."""


def add(first, second):
    """Add two numbers."""
    total = first + second
    return total


class Box:
    def put(self, thing: str) -> None:
        """Keep a thing, é."""
        self.thing = thing
'''
PROSE = "The mill stands by the river. Its stones turn slowly, and the grain becomes flour. "


def write_split(folder: Path, split: str, rows: list[tuple[str, str, str]]) -> None:
    """rows: (id, source, text)."""
    ids, sources, texts = zip(*rows, strict=True) if rows else ((), (), ())
    sizes = pa.array([len(text.encode()) for text in texts], pa.int64())
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "source": pa.array(sources, pa.string()),
            "text": pa.array(texts, pa.string()),
            "num_bytes": sizes,
        }
    )
    pq.write_table(table, folder / f"documents-{split}.parquet", row_group_size=3)


def rows(start: int, count: int) -> list[tuple[str, str, str]]:
    code = [(f"c{i}", "code", CODE.replace("add", f"add_{i}") * (1 + i % 3)) for i in range(start, start + count)]
    prose = [(f"p{i}", "prose", f"Chapter {i}. " + PROSE * (1 + i % 4)) for i in range(start, start + count)]
    return code + prose


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_split(folder, "train", rows(0, 12))
    write_split(folder, "validation", rows(20, 4))
    write_split(folder, "test", rows(30, 5))
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(TokenizerConfig(vocab_size=300), corpus, folder)
    return Tokenizer.load(folder)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[[list[tuple[str, str, str]]], Path]:
    """A corpus whose three splits hold the same rows."""

    def make(given: list[tuple[str, str, str]]) -> Path:
        for split in ("train", "validation", "test"):
            write_split(tmp_path, split, given)
        return tmp_path

    return make
