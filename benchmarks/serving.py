"""What the endpoint costs over the bare engine: tokens a second of 8 streams, and the time to the first token.

    python benchmarks/serving.py [MODEL]      MODEL: a Hugging Face directory [default: shape M of inference.py, bf16]

`gristmill serve` is a process of its own, so is the bare engine (inference_worker.py), and the clients are this one: 8
sockets that read and count. Server and engine take turns with the same prompts of 64 tokens, new ones each round, and
both have THREADS threads. The rate is that from the moment when each of the 8 has its first token to the last byte; a
first token's time is that of one stream alone, from the request (or the submission) to its first byte (or piece).
Medians over the rounds, the ratio that of each round's; results to results/inference.json.
"""

import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inference import RESULTS, THREADS, M, Rates, fresh, ours_of, side
from training import Side

from gristmill.train.machine import describe_machine

STREAMS, PROMPT, NEW, ROUNDS, WARM_UP = 8, 64, 48, 5, 1


@contextmanager
def serving(model: Path) -> Iterator[int]:
    """The port of `gristmill serve`."""
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(model), "--port", "0", "--name", "m"]
    env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "GRISTMILL_DATABASE": str(Path(os.devnull, "none"))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if found := re.match(r"serving .*:(\d+)", line):
                    yield int(found[1])
                    return
            raise SystemExit("the server does not start")
        finally:
            server.terminate()


def ask_server(port: int, prompts: list[list[int]], new: int) -> tuple[float, float, int]:
    """All at once: seconds until each had its first token, until all were complete, and how many tokens came."""
    requests = []
    for prompt in prompts:
        settings = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": new, **settings}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        requests.append(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    with selectors.DefaultSelector() as ready:
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in prompts]
        said = {connection: bytearray() for connection in connections}
        firsts: dict[socket.socket, float] = {}
        started = time.perf_counter()
        for connection, request in zip(connections, requests, strict=True):
            connection.sendall(request)
            ready.register(connection, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                part = connection.recv(65536)
                said[connection] += part
                if connection not in firsts and b"data: " in said[connection]:
                    firsts[connection] = time.perf_counter()
                if not part or said[connection].endswith(b"0\r\n\r\n"):
                    ready.unregister(connection)
        ended = time.perf_counter()
    for connection in connections:
        connection.close()
    usages = [re.findall(rb'"completion_tokens":(\d+)', text) for text in said.values()]
    assert all(text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for text in said.values()), [
        text[-200:] for text in said.values()
    ]
    return max(firsts.values()) - started, ended - started, sum(int(usage[-1]) for usage in usages)


def ask_engine(engine: Side, prompts: list[list[int]], new: int) -> tuple[float, float, int]:
    answer = engine.ask(json.dumps({"prompts": prompts, "new": new}))
    return answer["first"], answer["first"] + answer["rest"], sum(map(len, answer["tokens"]))


def main() -> None:
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    model, load = given or ours_of(M, "bf16"), os.getloadavg()[0]
    rates, step_ms = Rates(), []
    with serving(model) as port, side("gristmill", model) as engine:
        for number in range(-WARM_UP, ROUNDS):
            prompts, alone = fresh(M, STREAMS, PROMPT, 4 * number), fresh(M, 3, PROMPT, 4 * number + 1)
            turns = {
                "server": lambda *asked: ask_server(port, *asked),
                "engine": lambda *asked: ask_engine(engine, *asked),
            }
            rate, first = {}, {}
            for name in ("server", "engine") if number % 2 else ("engine", "server"):
                first[name] = 1000 * statistics.median(turns[name]([prompt], 1)[0] for prompt in alone)
                begun, ended, tokens = turns[name](prompts, NEW)
                rate[name] = (tokens - STREAMS) / (ended - begun)
            if number >= 0:
                rates.add("server_overhead", rate["server"], rate["engine"])
                rates.add("server_first_token_ms", first["server"], first["engine"])
                step_ms.append(1000 * STREAMS / rate["engine"])
            print(
                f"{number:3}",
                *(f"{name}: {rate[name]:.1f} tokens/s, {first[name]:.1f} ms" for name in turns),
                flush=True,
            )
    rows = rates.rows()
    machine = describe_machine() | {
        "threads": THREADS,
        "streams": STREAMS,
        "step_ms": round(statistics.median(step_ms), 1),
    }
    is_urgent = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)  # where others' work would spoil it
    machine |= {"real_time": is_urgent, "load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    print(json.dumps(rows, indent=2), json.dumps(machine), sep="\n")
    if given is None:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(known | rows | {"server_machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
