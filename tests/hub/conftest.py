import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill import artifact
from gristmill.artifact import Built
from gristmill.hub import in_memory, write_weights
from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.tokenizer import TokenizerConfig, build_tokenizer

SHAPE = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "kv_n_heads": 2,
    "ffn_hidden_size": 24,
    "vocab_size": 384,
    "max_seq_len": 96,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "initializer_range": 0.2,
    "rope_theta": 2000.0,
}
TEXTS = ["The mill stands by the river. ", "def add(a, b):\n    return a + b\n", "Körner und Mehl. "]


@pytest.fixture
def tiny() -> Callable[..., Transformer]:
    def make(**changes: Any) -> Transformer:
        return init_weights(Transformer(ModelConfig(**{**SHAPE, **changes})), seed=0).eval()

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("tokenizer")
    texts = [text * 5 for text in TEXTS]
    table = pa.table(
        {
            "id": ["0", "1", "2"],
            "source": ["code"] * 3,
            "text": texts,
            "num_bytes": [len(text.encode()) for text in texts],
        }
    )
    for split in ("train", "validation", "test"):
        pq.write_table(table, folder / f"documents-{split}.parquet")
    build_tokenizer(TokenizerConfig(vocab_size=300), folder, out)
    return out


@pytest.fixture
def checkpoint(tiny: Callable[..., Transformer], tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Commits a checkpoint artifact that descends from a corpus of two sources."""

    def make(**changes: Any) -> Path:
        sources = {
            "code": {
                "documents": 2,
                "bytes": 700,
                "licenses": {"MIT": 400, "BSD-3-Clause": 300},
                "fingerprint": "a",
                "packages": {"numpy": "2.0"},
            },
            "prose": {
                "documents": 1,
                "bytes": 90,
                "licenses": {"PSF-2.0": 90},
                "fingerprint": "b",
                "path": "/home/me/notes",
            },
        }
        corpus = artifact.prepare(tmp_path / "corpus")
        (corpus / "drops.json").write_text("{}")
        above = artifact.commit(corpus, kind="corpus", key="c", config={}, inputs={}, built=Built(sources=sources))
        model = tiny(**changes)
        path = artifact.prepare(tmp_path / "step-00000001")
        write_weights(path, in_memory(model.state_dict()))
        (path / "model.json").write_bytes(artifact.canonical(asdict(model.cfg)))
        (path / "tokenizer").mkdir()
        for file in tokenizer_dir.iterdir():
            (path / "tokenizer" / file.name).write_bytes(file.read_bytes())
        artifact.commit(path, kind="checkpoint", key="k", config={}, inputs={"corpus": above}, built=Built())
        return path

    return make


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    figures = {"all": 2.5, "code": 2.25, "prose": 3.0}
    samples = [{"source": "code", "prompt": text, "truth": text * 2, "greedy": "", "sampled": ""} for text in TEXTS]
    (folder / "evaluation.json").write_text(
        json.dumps(
            {
                "validation": {"bits_per_byte": figures, "documents": 3, "bytes": 100},
                "test": {"bits_per_byte": figures, "documents": 3, "bytes": 100},
                "baselines": {"xz_document": figures, "xz": figures, "trigram": figures},
                "samples": samples,
                "parse_share": {"greedy": 0.5, "sampled": 0.25, "functions": 8},
            }
        )
    )
    return folder
