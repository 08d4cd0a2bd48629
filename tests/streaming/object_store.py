"""An object store on loopback that serves a directory and misbehaves on command; and processes that read from it.

`asked` counts the GETs of each file. Faults are given by a file's path; HEAD, by which fsspec learns sizes, has
none.
"""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from forked import SERVER

from gristmill.streaming import Batches, MDSReader, MixPhase, Remote, remote
from gristmill.streaming.cache import Cache


@dataclass
class Fault:
    """One answer that goes wrong. short: bytes of an honest but cut body. cut: bytes after which the connection ends;
    hold: after which it falls silent. pause_s: between 1,000 bytes. extra: bytes too many."""

    status: int | None = None
    short: int | None = None
    cut: int | None = None
    hold: int | None = None
    flip: bool = False
    extra: bool = False
    reset: bool = False
    pause_s: float = 0.0
    times: int = 1_000_000


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict[str, list[Fault]] = {}
        self.chance: Callable[[], Fault | None] = lambda: None  # for files without a fault of their own
        self.asked: Counter[str] = Counter()
        self.release = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(self.path).lstrip("/")
                store.asked[path] += 1
                try:
                    self.answer(path, store.fault(path) or Fault())
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def do_HEAD(self) -> None:
                self.answer(unquote(self.path).lstrip("/"), Fault())

            def answer(self, path: str, fault: Fault) -> None:
                file = store.root / path
                if fault.reset:  # RST instead of FIN
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    raise ConnectionResetError
                status = fault.status or (200 if file.is_file() else 404)
                data = file.read_bytes() if status == 200 else b"no"
                data = data[: fault.short] + b"?" * fault.extra
                if fault.flip:
                    data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                stop = fault.cut if fault.cut is not None else fault.hold
                for start in range(0, len(data[:stop]), 1000):
                    time.sleep(fault.pause_s)
                    self.wfile.write(data[:stop][start : start + 1000])
                if stop is not None:
                    self.wfile.flush()
                    self.close_connection = True
                    if fault.hold is not None:
                        store.release.wait(60)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fault(self, path: str) -> Fault | None:
        waiting = self.faults.get(path, [])
        if not waiting:
            return self.chance()
        waiting[0].times -= 1
        return waiting.pop(0) if waiting[0].times == 0 else waiting[0]


@contextmanager
def running_store(root: Path) -> Iterator[Store]:
    store = Store(root)
    threading.Thread(target=store.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield store
    finally:
        store.release.set()
        store.server.shutdown()
        store.server.server_close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- processes that read -------------------------------------------------------------------------------

CURRICULUM = (MixPhase(until=0.5, mix={"code": 3, "prose": 1}), MixPhase(until=1.0, mix={"prose": 2, "tiny": 1}))
STEPS = 40


def open_batches(indexes: Path, where: Remote | None) -> Batches:
    return Batches(indexes, 16, 8, STEPS, CURRICULUM, 5, where)


def reader_of(indexes: Path, where: Remote, source: str = "code") -> MDSReader:
    return MDSReader(indexes / source, Cache(where).files(source))


def same_samples(a: MDSReader, b: MDSReader, i: int) -> bool:
    return all(np.array_equal(a[i][name], b[i][name]) for name in ("tokens", "starts"))


def read_samples(local: Path, where: Remote, seed: int, times: float, wrong: Any) -> None:
    """Read samples of `code` in random order, each `times` times; 1 into `wrong` when one was not as it should be."""
    remote.WAITS_S = (0.0,) * 8
    remote.console.quiet = True
    expected, reader = MDSReader(local / "code"), reader_of(local, where)
    chance = random.Random(seed)
    while times > 0:
        times -= 1
        for i in chance.sample(range(len(reader)), len(reader)):
            if not same_samples(reader, expected, i):
                wrong.value = 1


def start_reader(local: Path, where: Remote, seed: int, times: float) -> Any:
    """A process of `read_samples` and its verdict."""
    wrong = SERVER.Value("b", 0)
    process = SERVER.Process(target=read_samples, args=(local, where, seed, times, wrong), daemon=True)
    process.start()
    return process, wrong
