"""`gristmill serve`: what has to be right before the first request, and what is printed."""

import gc
import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

from gristmill.errors import Failure, InputError
from gristmill.inference import EngineConfig
from gristmill.kernels.memory import keep_freed_memory
from gristmill.progress import data_size
from gristmill.serve.config import ServeConfig
from gristmill.serve.database import Database
from gristmill.serve.gate import Gate
from gristmill.serve.keys import all_keys
from gristmill.serve.load import Served, load
from gristmill.serve.usage import Prices


def serve(
    path: Path,
    cfg: ServeConfig,
    engine: EngineConfig | None = None,
    dtype: str | None = None,
    memory_bytes: int | None = None,
    database: str | None = None,
    prices: Prices | None = None,
) -> int:
    """Serve a model until SIGTERM (returns 0) or Ctrl-C (returns 130).

    Args:
        engine, dtype, memory_bytes: see `load_engine`.

    Raises InputError when there is no model, when a public address would be open to all, or the port is taken; Failure
    when the engine has broken.
    """
    try:
        from gristmill.serve.app import build_app
        from gristmill.serve.server import Server
    except ModuleNotFoundError as missing:
        raise Failure(
            f"serving needs {missing.name}, which is not installed: `pip install 'gristmill[serve]'`"
        ) from None
    gate = open_gate(database, prices)
    check_address(cfg, gate)
    print(f"loading {path} …", flush=True)
    served = loaded(lambda: load(path, engine, dtype, memory_bytes))
    app = build_app(served, cfg, gate)
    gc.collect()
    gc.freeze()  # what is loaded stays: to go through it for garbage would stop all answers for 50 ms and more
    server = Server(app, cfg, lambda port: print("\n".join(welcome(cfg, gate, port, served)), flush=True))
    server.run()
    if (problem := app.state.endpoint.worker.broken) is not None:
        raise Failure(f"the engine has stopped: {problem!r}; the log says where")
    return 130 if server.signum == signal.SIGINT else 0


def loaded(load: Callable[[], Served]) -> Served:
    """Load the model in a thread, and end the thread: OpenMP keeps a team for each thread that computes, and when they
    have more members than there are processors, all of them sleep between two products."""
    found: Future[Served] = Future()

    def run() -> None:
        try:
            found.set_result(load())
        except BaseException as problem:
            found.set_exception(problem)

    thread = threading.Thread(target=run, name="load", daemon=True)  # Ctrl-C does not wait for it
    thread.start()
    served = found.result()
    thread.join()
    keep_freed_memory()  # or glibc gives each step's temporaries back, as it does for all threads but the first
    return served


def open_gate(database: str | None, prices: Prices | None = None) -> Gate:
    """Keys are asked for when a database is named, and where one key was ever made: revoking the last opens nothing."""
    if database is None:
        if (found := Database.existing()) is None:
            return Gate()
        with closing(found):
            if not all_keys(found):
                return Gate()
    return Gate(Database(database), prices)


def check_address(cfg: ServeConfig, gate: Gate) -> None:
    if gate.is_open and not cfg.is_loopback:
        raise InputError(
            f"host={cfg.host} can be reached from other machines, and there are no keys: anyone could use the model; "
            "make one with `gristmill keys create NAME`, or serve on 127.0.0.1"
        )


def welcome(cfg: ServeConfig, gate: Gate, port: int, served: Served) -> list[str]:
    """Return the lines that are printed when the server is ready, with a first request to copy."""
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    host = "127.0.0.1" if cfg.host in ("0.0.0.0", "::") else host
    url = f"http://{host}:{port}"
    asked = json.dumps({"model": cfg.name, "prompt": "def fibonacci(", "max_tokens": 64}).replace("'", "\\u0027")
    key = "" if gate.is_open else " -H 'authorization: Bearer YOUR-KEY'"
    return [
        f"serving {cfg.name} on {url}" + (" (no keys: open to everyone on this machine)" if gate.is_open else ""),
        f"  curl {url}/v1/completions{key} -H 'content-type: application/json' -d '{asked}'",
        f"in a browser: {url}/",
        served.no_chat or f"conversations: {url}/v1/chat/completions",
        cache_text(served),
        "Ctrl-C ends it",
    ]


def cache_text(served: Served) -> str:
    """Return one line about the capacity of the cache."""
    engine = served.engine
    tokens = engine.cfg.num_blocks * engine.cfg.block_tokens
    return (
        f"cache: {tokens:,} tokens of all requests together ({data_size(engine.runner.paged.nbytes)}); "
        f"one request may have {served.context:,}"
    )
