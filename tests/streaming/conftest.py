"""A corpus of invented documents, an encoder that needs no tokenizer, and the shards of both."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.streaming import ShardsConfig, build_shards

EOT = 256
BLOCK = 48


def encode_batch(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.fixture(scope="session")
def documents() -> dict[str, dict[str, str]]:
    """source -> id -> text: some longer than several blocks, some empty."""
    return {
        "code": {f"c{i}": f"<{i}" + "xyz"[i % 3] * (i * 37 % 150) + ">" for i in range(60)},
        "prose": {f"p{i}": "" if i == 3 else f"({i}" + "é" * (i * 5) + ")" for i in range(17)},
        "tiny": {"t": "ab"},
    }


@pytest.fixture(scope="session")
def corpus(documents: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(id, source, text) for source, texts in documents.items() for id, text in texts.items()]
    columns = {
        "id": [id for id, _, _ in rows],
        "source": [source for _, source, _ in rows],
        "text": [text for _, _, text in rows],
        "num_bytes": pa.array([len(text.encode()) for _, _, text in rows], pa.int64()),
    }
    folder = tmp_path_factory.mktemp("corpus")
    pq.write_table(pa.table(columns), folder / "documents-train.parquet", row_group_size=10)
    return folder


@pytest.fixture(scope="session")
def make_shards(corpus: Path) -> Callable[[ShardsConfig, Path], object]:
    return lambda cfg, out: build_shards(cfg, corpus, encode_batch, EOT, EOT + 1, out)


@pytest.fixture(scope="session")
def shards(make_shards: Callable[[ShardsConfig, Path], object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    make_shards(ShardsConfig(block_tokens=BLOCK, size_limit=2000), out)
    return out
