"""`gristmill serve` as a process of its own over a tiny random model, seen from outside."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gristmill.hub import in_memory, write_weights
from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer

TEXT = "The miller's daughter said: it is fine, isn't it?\ndef mill(grain: int) -> int:\n    return 1\n"


def write_model(out: Path) -> Path:
    """A checkpoint of random weights, with a tokenizer that was made from TEXT."""
    corpus, tokenizer = out / "corpus", out / "tokenizer"
    for folder in (corpus, tokenizer):
        folder.mkdir(parents=True)
    columns = {"id": ["0"], "source": ["s"], "text": [TEXT * 9], "num_bytes": pa.array([9 * len(TEXT)], pa.int64())}
    for split in ("train", "validation"):
        pq.write_table(pa.table(columns), corpus / f"documents-{split}.parquet")
    build_tokenizer(TokenizerConfig(vocab_size=320), corpus, tokenizer)
    cfg = ModelConfig(
        d_model=32, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=24, max_seq_len=2048, moe_num_experts=4,
        moe_top_k=2, initializer_range=0.2, vocab_size=Tokenizer.load(tokenizer).vocab_size,
    )  # fmt: skip
    (out / "model.json").write_text(json.dumps(asdict(cfg)))
    write_weights(out, in_memory(init_weights(Transformer(cfg), seed=0).state_dict()))
    return out


@dataclass
class Running:
    process: "subprocess.Popen[str]"
    port: int
    key: str = ""

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        given = {"host": "127.0.0.1", "authorization": f"Bearer {self.key}", "content-length": str(len(body))}
        given |= {"content-type": "application/json", "connection": "close"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    def completion(self, **settings: Any) -> bytes:
        body = {"model": "tiny", "prompt": "The miller", "temperature": 0, **settings}
        return self.request("POST", "/v1/completions", json.dumps(body).encode())

    async def ask(self, request: bytes) -> "Answer":
        """To the end, which the server makes."""
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            status, first, said = int(head.split()[1]), 0.0, bytearray()
            while part := await reader.read(1 << 16):
                first = first or time.monotonic()
                said += part
        finally:
            writer.transport.abort()
        return Answer(status, head, bytes(said), (first or time.monotonic()) - started, time.monotonic() - started)

    async def load(self) -> dict[str, Any]:
        answer = await self.ask(self.request("GET", "/v1/load"))
        assert answer.status == 200, answer
        found: dict[str, Any] = json.loads(answer.body)
        return found

    async def until_idle(self, seconds: float) -> float:
        """Until nothing runs or waits and no block is held; how long that took."""
        started = time.monotonic()
        while time.monotonic() < started + seconds:
            load = await self.load()
            if not (load["running"] or load["waiting"] or load["blocks_in_use"]):
                return time.monotonic() - started
            await asyncio.sleep(0.02)
        raise AssertionError(f"after {seconds} s: {load}")


@dataclass(frozen=True)
class Answer:
    """first_s: to the first byte of the body; whole_s: to the last."""

    status: int
    head: bytes
    said: bytes
    first_s: float
    whole_s: float

    @property
    def is_whole(self) -> bool:
        """Whether its last byte came: a server that dies leaves an answer without an end."""
        if b"transfer-encoding: chunked" in self.head.lower():
            return self.said.endswith(b"0\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", self.head.lower())
        return found is not None and len(self.said) == int(found[1])

    @property
    def body(self) -> bytes:
        """Of answers that are no streams."""
        assert self.is_whole, self
        return self.said


@contextmanager
def running(model: Path, database: Path, key: str) -> Iterator[Running]:
    """With the settings that the command has by itself. It must end with 0 when it is told to, unless it was killed."""
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(model), "--port", "0", "--name", "tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = database.with_suffix(".log")
    with (
        log.open("a") as errors,
        subprocess.Popen(
            [*command, "--database", str(database)], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            found = next((m for line in process.stdout if (m := re.match(r"serving .*:(\d+)", line))), None)
            assert found, log.read_text()
            yield Running(process, int(found[1]), key)
        finally:
            process.terminate()
            code = process.wait(60)
    assert code in (0, -signal.SIGKILL), (code, log.read_text()[-3000:])
    assert not log.read_text(), log.read_text()[-3000:]
