"""Claims about the blocks that a corpus becomes: nothing is lost, moved between sources or written twice."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.artifact import Built
from gristmill.errors import InputError
from gristmill.streaming import MDSReader, ShardsConfig, build_shards

EOT = 256
BLOCK = 48
MakeShards = Callable[[ShardsConfig, Path], Built]
Documents = dict[str, dict[str, str]]


def stream_of(path: Path, num_tokens: int) -> list[int]:
    """The ids of a source's stream, put together from its blocks; checks how the blocks join and wrap."""
    reader = MDSReader(path)
    blocks = [reader[i]["tokens"].tolist() for i in range(len(reader))]
    assert all(len(block) == BLOCK + 1 for block in blocks)
    assert all(a[-1] == b[0] for a, b in pairwise(blocks))
    ids = [id for block in blocks for id in block[:-1]] + blocks[-1][-1:]
    assert len(blocks) == -(-num_tokens // BLOCK)
    assert all(ids[i] == ids[i % num_tokens] for i in range(len(ids)))
    return ids[:num_tokens]


def test_the_blocks_hold_every_document_once_after_its_end_of_text(shards: Path, documents: Documents) -> None:
    assert sorted(entry.name for entry in shards.iterdir()) == sorted(documents)
    for source, texts in documents.items():
        ids = stream_of(shards / source, sum(len(text.encode()) + 1 for text in texts.values()))
        assert ids[0] == EOT
        ends = [i for i, id in enumerate(ids) if id == EOT] + [len(ids)]
        found = [bytes(ids[a + 1 : b]).decode() for a, b in pairwise(ends)]
        assert sorted(found) == sorted(texts.values())
        if len(texts) > 10:
            assert found != list(texts.values())  # shuffled


def test_starts_are_where_documents_start_and_the_blocks_beginning(shards: Path, documents: Documents) -> None:
    for source in documents:
        reader = MDSReader(shards / source)
        for i in range(len(reader)):
            sample = reader[i]
            expected = {0, *(at for at, id in enumerate(sample["tokens"][:-1].tolist()) if id == EOT)}
            assert sample["starts"].tolist() == sorted(expected)
            assert (sample["tokens"].dtype, sample["starts"].dtype) == (np.uint16, np.uint32)


def test_the_figures_count_the_corpus(make_shards: MakeShards, documents: Documents, tmp_path: Path) -> None:
    metrics = make_shards(ShardsConfig(block_tokens=BLOCK), tmp_path).metrics
    num_bytes = {source: sum(len(text.encode()) for text in texts.values()) for source, texts in documents.items()}
    for source, texts in documents.items():
        tokens = num_bytes[source] + len(texts)
        assert metrics["sources"][source] == {
            "documents": len(texts),
            "tokens": tokens,
            "blocks": -(-tokens // BLOCK),
            "bytes": num_bytes[source],
        }
    all_tokens = sum(figures["tokens"] for figures in metrics["sources"].values())
    assert metrics["bytes_per_token"] == sum(num_bytes.values()) / all_tokens


@pytest.mark.parametrize("compression", [None, "zstd", "gz:1"])
def test_shards_repeat_byte_for_byte_and_leave_nothing_else(
    make_shards: MakeShards, tmp_path: Path, compression: str | None
) -> None:
    cfg = ShardsConfig(block_tokens=BLOCK, size_limit=2000, compression=compression)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_shards(cfg, tmp_path / name)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.*")) for n in ("a", "b")]
    assert len(files[0]) > 6
    assert files[0] == files[1]
    kinds = {"".join(file.suffixes[1:]) or file.name for file in files[0]}
    assert kinds == {f".mds.{compression.split(':')[0]}" if compression else ".mds", "index.json"}
    for file in files[0]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_large_vocabulary_is_stored_in_four_bytes(corpus: Path, tmp_path: Path) -> None:
    big = 1 << 16
    build_shards(
        ShardsConfig(block_tokens=BLOCK),
        corpus,
        lambda texts: [[big] * len(text) for text in texts],
        0,
        big + 1,
        tmp_path,
    )
    tokens = MDSReader(tmp_path / "code")[0]["tokens"]
    assert tokens.dtype == np.uint32
    assert tokens.max() == big


def test_an_empty_corpus_and_impossible_settings_say_so(corpus: Path, tmp_path: Path) -> None:
    table = pq.read_table(corpus / "documents-train.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "documents-train.parquet")
    with pytest.raises(InputError, match="no documents"):
        build_shards(ShardsConfig(), tmp_path, lambda texts: [[] for _ in texts], 0, 1, tmp_path)
    escaping = table.slice(0, 1).set_column(1, "source", pa.array(["../x"]))
    pq.write_table(escaping, tmp_path / "documents-train.parquet")
    with pytest.raises(InputError, match="cannot be the name of a directory"):
        build_shards(ShardsConfig(), tmp_path, lambda texts: [[] for _ in texts], 0, 1, tmp_path)
    for field, value in (("block_tokens", 0), ("size_limit", 1 << 32), ("size_limit", 3), ("compression", "lz4")):
        with pytest.raises(ValueError, match=f"^{field}="):
            ShardsConfig(**{field: value})
