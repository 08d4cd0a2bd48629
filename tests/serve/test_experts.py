"""return_experts, over both endpoints: what is told is what the engine says when it is asked directly."""

import json
from typing import Any

from running_server import Direct, Running

from gristmill.inference import Engine, EngineConfig
from gristmill.inference.settings import Published
from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.serve.load import Served
from gristmill.tokenizer import Tokenizer

PROMPT = "The miller's daughter"
USER = {"role": "user", "content": "Grüße, 世界!"}


def test_experts_are_the_engines_and_told_to_those_who_ask(server: Running, direct: Direct) -> None:
    chat = {"model": "tiny", "messages": [USER], "temperature": 0, "max_tokens": 6}
    texts = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "echo": True}
    for path, body, ids in (
        ("/v1/chat/completions", chat, direct.chat_ids(USER)),
        ("/v1/completions", texts, direct.text_ids(PROMPT)),
    ):
        [(_, tokens, _)] = direct.ask(ids, max_tokens=6, echo="echo" in body, experts=True)
        wanted = [[[[e for e, _ in layer] for layer in t.experts], [[w for _, w in layer] for layer in t.experts]]
                  for t in tokens]  # fmt: skip
        whole = server.post(path, {**body, "return_experts": True}).json()["choices"][0]["experts"]
        assert [[told["ids"], told["weights"]] for told in whole] == wanted
        events = server.post(path, {**body, "return_experts": True, "stream": True}).content.split(b"\n\n")[:-2]
        chunks = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
        assert [told for chunk in chunks for told in chunk.get("experts", ())] == whole
        assert "experts" not in server.post(path, body).json()["choices"][0]


def test_a_dense_model_refuses_to_tell_experts(serving: Any, tokenizer: Tokenizer) -> None:
    cfg = ModelConfig(d_model=32, n_layers=1, n_heads=4, kv_n_heads=2, ffn_hidden_size=24, ffn="dense",
                      vocab_size=tokenizer.vocab_size, max_seq_len=64)  # fmt: skip
    engine = Engine(init_weights(Transformer(cfg), seed=0).eval(), EngineConfig(cache_tokens=256), tokenizer)
    with serving(Served(engine=engine, tokenizer=tokenizer, published=Published())) as running:
        error = running.post("/v1/completions", {"model": "tiny", "prompt": "a", "return_experts": True}).json()[
            "error"
        ]
        assert (error["param"], error["code"]) == ("return_experts", "no_experts")
        assert running.get("/v1/models").json()["data"][0]["experts"] is None
