"""A real server on a free port, with a tiny random model and a real tokenizer; and the same model's engine."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from running_server import Direct, Running

from gristmill.inference import Engine, EngineConfig
from gristmill.inference.settings import Published
from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.serve import config
from gristmill.serve.app import build_app
from gristmill.serve.config import ServeConfig
from gristmill.serve.database import Database
from gristmill.serve.gate import Gate
from gristmill.serve.load import Served
from gristmill.serve.server import Server
from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer

TEXT = (
    "The miller's daughter said: it is fine, isn't it?  Grüße, 世界! 🌾\ndef mill(grain: int) -> int:\n    return 1\n"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    corpus, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("tokenizer")
    columns = {"id": ["0"], "source": ["s"], "text": [TEXT * 9], "num_bytes": pa.array([9 * len(TEXT)], pa.int64())}
    for split in ("train", "validation"):
        pq.write_table(pa.table(columns), corpus / f"documents-{split}.parquet")
    build_tokenizer(TokenizerConfig(vocab_size=320), corpus, out)
    return Tokenizer.load(out)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Transformer:
    torch.set_num_threads(1)
    cfg = ModelConfig(
        d_model=32, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=24, vocab_size=tokenizer.vocab_size,
        max_seq_len=2048, moe_num_experts=4, moe_top_k=2, initializer_range=0.2,
    )  # fmt: skip
    return init_weights(Transformer(cfg), seed=0).eval()


@pytest.fixture(scope="session")
def served(model: Transformer, tokenizer: Tokenizer) -> Callable[..., Served]:
    def make(published: Published | None = None, no_chat: str | None = None, **engine: Any) -> Served:
        cfg = EngineConfig(**{"cache_tokens": 8192, **engine})
        return Served(
            engine=Engine(deepcopy(model), cfg, tokenizer),
            tokenizer=tokenizer,
            published=published or Published(),
            no_chat=no_chat,
        )

    return make


Serving = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def serving(served: Callable[..., Served]) -> Serving:
    """A server of one's own: `with serving(request_s=1) as running`. Settings are `ServeConfig`'s, and the constants
    of config.py in lower case (`header_s=0.3`)."""

    @contextmanager
    def run(it: Served | None = None, gate: Gate | None = None, **settings: Any) -> Iterator[Running]:
        constants = {name: value for name, value in settings.items() if name.upper() in vars(config)}
        settings = {name: value for name, value in settings.items() if name not in constants}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in constants.items():
                patch.setattr(config, name.upper(), value)
            cfg = ServeConfig(**{"port": 0, "name": "tiny", **settings})
            app = build_app(it or served(), cfg, gate or Gate())
            ports: queue.Queue[int] = queue.Queue()
            server = Server(app, cfg, ports.put)
            thread = threading.Thread(target=server.run)
            thread.start()
            try:
                yield Running(f"http://127.0.0.1:{ports.get(timeout=60)}", app.state.endpoint, server)
            finally:
                server.should_exit = True
                thread.join()

    return run


@pytest.fixture(scope="session")
def server(serving: Serving) -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def direct(model: Transformer, tokenizer: Tokenizer) -> Direct:
    return Direct(deepcopy(model), tokenizer)  # an engine changes its model's layers while it computes


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """One of its own for each test."""
    database = Database(str(tmp_path / "serve.sqlite"))
    yield database
    database.close()
