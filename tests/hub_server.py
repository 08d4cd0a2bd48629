"""A small hub on loopback: the part of the hub's HTTP interface that a pull meets, with faults to order.

Large files are redirected to a storage address of another origin ("localhost" against "127.0.0.1"), as the real hub
does. `requests` holds what was asked, in order. At the end, the processes that pull from it.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from forked import SERVER

from gristmill.cli.exits import exit_code


@dataclass
class Fault:
    """One answer that goes wrong. `cut`: close the connection after so many bytes; `hold`: fall silent there."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    cut: int | None = None
    hold: int | None = None
    ignore_range: bool = False
    flip: bool = False
    silent_s: float = 0.0
    times: int = 1


@dataclass
class Repository:
    """`faults`: by "api" or a file's name; each is used up after its `times`. `xet`: file name -> Xet hash."""

    files: dict[str, bytes]
    large: tuple[str, ...] = ()
    card: dict[str, Any] | None = None
    tags: tuple[str, ...] = ("v1",)
    claimed_bytes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    xet: dict[str, str] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return sha1("".join(name + self.etag(name) for name in self.files).encode())

    def etag(self, name: str) -> str:
        data = self.files[name]
        return sha256(data) if name in self.large else sha1(b"blob %d\0" % len(data) + data)

    def sibling(self, name: str) -> dict[str, Any]:
        size = self.claimed_bytes.get(name, len(self.files[name]))
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": sha1(name.encode())}
        if name in self.large:
            return entry | {"lfs": {"size": size, "sha256": self.etag(name), "pointerSize": 134}}
        return entry | {"blobId": self.etag(name)}


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Hub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        self.cas = ""
        self.requests: list[Request] = []
        self.release = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                try:
                    _Answer(hub, self).give()
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def asked(self, word: str, method: str = "GET") -> list[Request]:
        return [request for request in self.requests if word in request.path and request.method == method]


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        hub.server.shutdown()
        hub.server.server_close()


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@lru_cache
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Answer:
    """One request and what it gets."""

    def __init__(self, hub: Hub, handler: BaseHTTPRequestHandler) -> None:
        self.hub, self.handler = hub, handler
        self.path = unquote(urlsplit(handler.path).path)
        hub.requests.append(Request(handler.command, self.path, {k.lower(): v for k, v in handler.headers.items()}))

    def give(self) -> None:
        parts = self.path.strip("/").split("/")
        match parts:
            case ["api", "models", org, name, *rest] if f"{org}/{name}" in self.hub.moved:
                new = self.hub.moved[f"{org}/{name}"]
                self.send(307, headers={"Location": "/".join(["/api/models", new, *rest])})
            case ["api", "models", org, name, "xet-read-token", _]:
                access = {
                    "X-Xet-Cas-Url": self.hub.cas,
                    "X-Xet-Access-Token": "t",
                    "X-Xet-Token-Expiration": "9999999999",
                }
                self.send(200, b"{}", access)
            case ["api", "models", org, name, *rest]:
                self.info(f"{org}/{name}", rest[1] if rest else "main")
            case [org, name, "resolve", revision, file]:
                self.resolve(f"{org}/{name}", revision, file)
            case ["storage", org, name, file]:
                self.storage(self.hub.repositories[f"{org}/{name}"], file)
            case _:
                self.send(404, b"what?")

    def info(self, name: str, revision: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            status = 404 if self.handler.headers.get("Authorization") else 401
            self.refuse(status, "RepoNotFound", "Repository not found")
        elif fault := self.fault(repository, "api"):
            time.sleep(fault.silent_s)
            self.send(fault.status or 200, fault.body.encode(), fault.headers)
        elif revision not in ("main", repository.sha, *repository.tags):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            siblings = [repository.sibling(file) for file in repository.files]
            info = {"id": name, "sha": repository.sha, "cardData": repository.card, "siblings": siblings}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories[name]
        assert revision == repository.sha, "a pull asks for files of one commit"
        if fault := self.fault(repository, file, only_refusals=True):
            self.send(fault.status or 200, fault.body.encode(), fault.headers)
            return
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{repository.etag(file)}"'}
        if file not in repository.large:
            self.send(200, repository.files[file], headers)
            return
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(repository.files[file]))}
        headers["Location"] = f"http://localhost:{self.hub.port}/storage/{name}/{file}"
        if file in repository.xet:
            headers["X-Xet-Hash"] = repository.xet[file]
            headers["X-Xet-Refresh-Route"] = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{repository.sha}"
        self.send(302, headers=headers)

    def storage(self, repository: Repository, file: str) -> None:
        data = repository.files[file]
        fault = self.fault(repository, file) or Fault()
        if fault.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = self.handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and not fault.ignore_range else 0
        headers = {"Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if start else 200, headers=headers)
        stop = fault.cut if fault.cut is not None else fault.hold
        self.handler.wfile.write(data[start:stop])
        if stop is not None:
            self.handler.wfile.flush()
            if fault.hold is not None:
                self.hub.release.wait(20)
            self.handler.close_connection = True

    def fault(self, repository: Repository, where: str, only_refusals: bool = False) -> Fault | None:
        waiting = repository.faults.get(where, [])
        if not waiting or (only_refusals and waiting[0].status is None):
            return None
        waiting[0].times -= 1
        return waiting.pop(0) if waiting[0].times == 0 else waiting[0]

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        headers = headers or {}
        self.handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.handler.send_header(key, value)
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body)


# ---- what it holds --------------------------------------------------------------------------------------

MB = 1 << 20


def random_bytes(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def model(seed: int = 1, size: int = 3 * MB, **extra: Any) -> Repository:
    """A qwen3_moe repository of two shards, and beside them all that should stay where it is."""
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    files = {
        "config.json": b'{"model_type": "qwen3_moe"}',
        "generation_config.json": b"{}",
        "tokenizer.json": random_bytes(seed + 7, 1000),
        "tokenizer_config.json": b"{}",
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
        "LICENSE": b"You may.",
        "license-model.md": b"You may.",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": dict(zip("abc", (*shards, shards[0]), strict=True))}
        ).encode(),
        shards[0]: random_bytes(seed, size),
        shards[1]: random_bytes(seed + 1, size + 5),
        "consolidated.safetensors": b"duplicate",
        "model.safetensors": b"duplicate",
        "pytorch_model.bin": b"pickle",
        "modeling_own.py": b"raise SystemExit",
        "LICENSE.py": b"raise SystemExit",
        "NOTICE.pkl": b"pickle",
        "vocab.json": b"{}",
        "merges.txt": b"",
        "special_tokens_map.json": b"{}",
        "added_tokens.json": b"{}",
        "model.gguf": b"GGUF",
        "original/config.json": b"{}",
        "original/LICENSE": b"other",
        "onnx/model.onnx": b"onnx",
        ".gitattributes": b"",
    }
    return Repository(files=files, large=("tokenizer.json", *shards), card={"license": "apache-2.0"}, **extra)


WANTED = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE"),
    "license-model.md",
    *("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
}
SHARD = "model-00002-of-00002.safetensors"


# ---- clients -------------------------------------------------------------------------------------------

TOKEN = "hf_thisIsTheSecretOfTheTests"

Jobs = list[tuple[str, str | None, Path | None]]  # name, revision, out


def serve(connection: Connection, home: Path, env: dict[str, str]) -> None:
    """Pulls the jobs that arrive, one after another, and answers with their exit codes and what they said."""
    assert "huggingface_hub" not in sys.modules, "it reads the environment when it is opened"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(home)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while jobs := connection.recv():
        connection.send([attempt(*job) for job in jobs])


def attempt(repository: str, revision: str | None, out: Path | None) -> tuple[int, str]:
    def call() -> None:
        from gristmill.hub import pull

        pull.WAITS_S = (0.0,) * 5
        pull.pull(repository, revision, out)

    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = exit_code(call)
        except BaseException:
            traceback.print_exc()
            code = -1
    return code, said.getvalue()


@dataclass
class Outcome:
    code: int
    said: str

    @property
    def error(self) -> str:
        """The last line; an outcome that failed says one line of error."""
        return self.said.strip().splitlines()[-1] if self.said.strip() else ""


class Client:
    """A process that pulls. `extra`: of its environment."""

    def __init__(self, endpoint: str, home: Path, **extra: str) -> None:
        self.connection, theirs = SERVER.Pipe()
        env = environment(endpoint, home) | extra
        self.process = SERVER.Process(target=serve, args=(theirs, home, env), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, jobs: Jobs) -> None:
        self.connection.send(jobs)

    def receive(self) -> list[Outcome]:
        """Raises EOFError when the process has ended."""
        outcomes = [Outcome(*outcome) for outcome in self.connection.recv()]
        assert not [outcome for outcome in outcomes if TOKEN in outcome.said]
        return outcomes

    def pull(self, *jobs: tuple[str, str | None, Path | None]) -> list[Outcome]:
        self.send(list(jobs))
        return self.receive()

    def kill(self, sent: signal.Signals) -> None:
        assert self.process.pid
        os.kill(self.process.pid, sent)

    def close(self) -> None:
        self.connection.send([])
        self.process.join(20)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """This one without what a user's own settings could bring in."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    return kept | ours | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "PYTHONWARNINGS": "ignore"}


def python(script: str, *args: str, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", script, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
