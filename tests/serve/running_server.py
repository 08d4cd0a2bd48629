"""What the tests of the endpoint hold in their hands: a server that runs, and the engine asked without one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai

from gristmill.inference import Engine, EngineConfig, Request, Sampling, Token
from gristmill.model import Transformer
from gristmill.serve.routes import Endpoint
from gristmill.serve.server import Server
from gristmill.tokenizer import Tokenizer

HTTP = httpx2.Client(timeout=60)


@dataclass(frozen=True)
class Running:
    url: str
    at: Endpoint
    server: Server

    def client(self, key: str = "none", **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **settings.pop("headers", {})}
        return HTTP.post(self.url + path, content=content, headers=headers, **settings)

    def get(self, path: str, **settings: Any) -> httpx2.Response:
        return HTTP.get(self.url + path, **settings)


@dataclass(frozen=True)
class Direct:
    """What the engine says when it is asked without a server."""

    model: Transformer
    tokenizer: Tokenizer

    def text_ids(self, text: str) -> list[int]:
        return [self.tokenizer.eot_id, *self.tokenizer.encode(text)]

    def chat_ids(self, *messages: Mapping[str, str]) -> list[int]:
        return self.tokenizer.chat(messages, generation_prompt=True)

    def ask(self, ids: list[int], **settings: Any) -> list[tuple[str, list[Token], str | None]]:
        """Of each answer its text, its tokens, and why it ended."""
        stops = frozenset({self.tokenizer.eot_id, self.tokenizer.im_end_id})
        settings = {"sampling": Sampling(temperature=0), "max_tokens": 16, **settings}
        engine = Engine(self.model, EngineConfig(cache_tokens=8192), self.tokenizer)
        request = replace(Request(prompt=ids, stop_ids=stops), **settings)
        pieces = list(engine.submit(request))
        mine = [[piece for piece in pieces if piece.choice == number] for number in range(request.n)]
        return [("".join(p.text for p in its), [t for p in its for t in p.tokens], its[-1].finish) for its in mine]
