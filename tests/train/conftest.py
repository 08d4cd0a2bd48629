"""Shards and a tokenizer for trainings that take seconds."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.streaming import ShardsConfig, build_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of arithmetic text; an id is a character's code."""
    rows = [
        (source, f"{source}{i}", f"{i} plus {k} is {i + k}; " * (1 + i % 7))
        for source in "ab"
        for i in range(40)
        for k in (i % 5,)
    ]
    columns = {
        "id": [id for _, id, _ in rows],
        "source": [source for source, _, _ in rows],
        "text": [text for _, _, text in rows],
        "num_bytes": pa.array([len(text) for _, _, text in rows], pa.int64()),
    }
    folder, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("shards")
    pq.write_table(pa.table(columns), folder / "documents-train.parquet")
    build_shards(ShardsConfig(block_tokens=64), folder, lambda texts: [list(t.encode()) for t in texts], 127, 128, out)
    return out


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder
