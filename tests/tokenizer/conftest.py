"""A small tokenizer, trained once, and the corpus that it was trained on."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer

CODE = "def mill(grain: int) -> int:\n    # it's ground\n    return grain * 12345\n\n"
PROSE = "The miller's daughter said: it is fine, isn't it?  Grüße, 世界! 🌾\n"


def write(folder: Path, documents: list[tuple[str, str, str]], split: str = "train") -> Path:
    """documents: (id, source, text)."""
    folder.mkdir(exist_ok=True)
    columns = {
        "id": [id for id, _, _ in documents],
        "source": [source for _, source, _ in documents],
        "text": [text for _, _, text in documents],
        "num_bytes": pa.array([len(text.encode()) for _, _, text in documents], pa.int64()),
    }
    pq.write_table(pa.table(columns), folder / f"documents-{split}.parquet", row_group_size=7)
    return folder


@pytest.fixture(scope="session")
def write_corpus() -> Callable[..., Path]:
    return write


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    code = [(f"c{i}", "code", CODE.replace("grain", f"grain_{i}") * 4) for i in range(30)]
    prose = [(f"p{i}", "prose", PROSE.replace("fine", "fine" * (i % 3)) * 4) for i in range(10)]
    write(folder, [("v0", "code", CODE), ("v1", "prose", PROSE)], "validation")
    return write(folder, code + prose)


@pytest.fixture(scope="session")
def tokenizer_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(TokenizerConfig(vocab_size=350), corpus, out)
    return out


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)
