from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.inference import runner
from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.tokenizer import TokenizerConfig, build_tokenizer


@pytest.fixture(autouse=True)
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RECORD_AFTER", 0)


@pytest.fixture
def tiny() -> Callable[..., Transformer]:
    """A random model whose weights are large enough that its predictions differ clearly."""

    def make(**changes: Any) -> Transformer:
        shape = {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "kv_n_heads": 2,
            "ffn_hidden_size": 24,
            "vocab_size": 300,
            "max_seq_len": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "initializer_range": 0.2,
        }
        return init_weights(Transformer(ModelConfig(**{**shape, **changes})), seed=0).eval()

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, out = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("tokenizer")
    text = "The mill stands by the river. " * 9
    table = pa.table({"id": ["0"], "source": ["prose"], "text": [text], "num_bytes": [len(text)]})
    for split in ("train", "validation", "test"):
        pq.write_table(table, folder / f"documents-{split}.parquet")
    build_tokenizer(TokenizerConfig(vocab_size=270), folder, out)
    return out
