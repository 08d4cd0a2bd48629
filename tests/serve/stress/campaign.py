"""The endpoint under everything that clients do to it, from outside, with the settings that `gristmill serve` has.

    python tests/serve/stress/campaign.py [--only malformed ...] [--share 1.0] [--table docs/reliability.md]

Each part asks one server, a process of its own over a tiny model, and asserts what is promised. What it says goes into
the table. Times are those of this machine with whatever else it does: nothing is asserted of them but that nobody
waits without an end.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from running import Answer, Running, running, write_model

from gristmill.serve import keys
from gristmill.serve.database import Database
from gristmill.serve.limits import Limits
from gristmill.serve.usage import used

BEGIN, END = "<!-- table of the endpoint: written by tests/serve/stress/campaign.py -->", "<!-- end of its table -->"
MAX_RUNNING, MAX_REQUESTS = 64, 512  # of EngineConfig and ServeConfig, which the command does not change
STEADY = 0.05
WARM_UP = 2000  # by then some forty bodies of a megabyte have come to the two threads that read them
Row = tuple[str, str, str]
GOOD: dict[str, Any] = {"max_tokens": 24, "logprobs": 5, "seed": 7}


async def together(asked: Sequence[Awaitable[Any]], at_once: int) -> list[Any]:
    room = asyncio.Semaphore(at_once)

    async def one(it: Awaitable[Any]) -> Any:
        async with room:
            return await it

    return await asyncio.gather(*(one(it) for it in asked))


# ---- what the schema allows, and what it does not ---------------------------------------------------------


def by_schema(server: Running, share: float) -> list[Row]:
    """schemathesis makes requests from our own schema, right ones and wrong ones."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("st")), "run", f"http://127.0.0.1:{server.port}/openapi.json"]
        command += [
            "--header",
            f"authorization: Bearer {server.key}",
            "--seed",
            "1",
            "--no-color",
            "--continue-on-failure",
        ]
        command += ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]
        command[-1] += ",response_schema_conformance"
        command += ["--max-examples", str(max(1, round(100 * share))), "--request-timeout", "60"]
        command += ["--suppress-health-check", "all"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"([\d,]+) generated", done.stdout)
    assert found, done.stdout
    said = "no 5xx, no status, content type or body that the schema does not name"
    return [("requests by schemathesis from the schema", found[1], said)]


# ---- malformed -------------------------------------------------------------------------------------------


def malformed(server: Running, share: float) -> list[Row]:
    return asyncio.run(_malformed(server, round(10_000 * share)))


async def _malformed(server: Running, count: int) -> list[Row]:
    chance, kinds, statuses = random.Random(0), Counter[str](), Counter[int]()
    before = await server.ask(server.completion(**GOOD))
    resident = []
    group = 100
    for number in range(0, count, group):
        chosen = [chance.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0] for _ in range(group)]
        asked = [KINDS[kind][1](server, chance) for kind in chosen]
        answers: list[Answer | None] = await together([_ask_or_reset(server, request) for request in asked], 8)
        for kind, request, answer in zip(chosen, asked, answers, strict=True):
            if answer is None:
                assert kind == "no such HTTP", (kind, request[:400])
                continue
            assert 400 <= answer.status < 500, (kind, request[:400], answer.head, answer.said[:500])
            error = json.loads(answer.body)["error"]
            assert error.keys() == {"message", "type", "param", "code"}, (kind, error)
        kinds.update(chosen)
        statuses.update(answer.status if answer else 0 for answer in answers)
        resident.append(server.resident_bytes)
        if number % 1000 == 0:
            print(f"  {number}: {resident[-1] / 2**20:.1f} MiB", flush=True)
    after = await server.ask(server.completion(**GOOD))
    assert json.loads(before.body)["choices"] == json.loads(after.body)["choices"]
    warm_up = min(WARM_UP, count // 2)
    steady = resident[warm_up // group :]
    grown = max(steady) / steady[0] - 1
    assert grown < STEADY, [b / 2**20 for b in resident]
    each = ", ".join(f"{n:,} times {status or 'cut off'}" for status, n in sorted(statuses.items()))
    warm = f"resident memory {steady[0] / 2**20:.0f} MiB after {warm_up:,}"
    memory = f"{warm}, then {100 * grown:+.1f}% at most"
    return [("malformed requests", f"{count:,}", f"{each}; {memory}; the same good answer before and after")]


async def _ask_or_reset(server: Running, request: bytes) -> Answer | None:
    """None where the server has ended the connection before it had read all: TCP may throw its words away then."""
    try:
        return await server.ask(request)
    except (ConnectionError, EOFError):
        return None


def _posted(body: Callable[[random.Random], bytes]) -> Callable[[Running, random.Random], bytes]:
    paths = ("/v1/completions", "/v1/chat/completions", "/v1/tokenize", "/v1/detokenize")
    return lambda server, chance: server.request("POST", chance.choice(paths), body(chance))


def _wrong_type(chance: random.Random) -> bytes:
    names = ["prompt", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "logit_bias", "messages"]
    wrong: list[Any] = [{}, {"a": [1]}, [[]], [None], [{"role": 1}], True, -1, 10**30, "x", 1.5, [1, "a"], {"1": "x"}]
    body = {"model": "tiny", "prompt": ["a", 1], "messages": [1], "tokens": ["a"], "nothing_like_it": 1}
    return json.dumps(body | {name: chance.choice(wrong) for name in chance.sample(names, 3)}).encode()


def _no_number(chance: random.Random) -> bytes:
    value = chance.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999999999", "0x1", "01", "1" * 5000])
    name = chance.choice(["temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty"])
    return f'{{"model": "tiny", "prompt": 1, "messages": [], "tokens": -1, "{name}": {value}}}'.encode()


def _megabyte(chance: random.Random) -> bytes:
    letters = chance.choice(["a", "mill ", "\u4e16", "<|im_end|>", "\x00", "'"])
    text = letters * (10**6 // len(letters.encode()))
    long = [0] * 300_000
    body: dict[str, Any] = {"model": "tiny", "prompt": chance.choice([text, [text], long]), "max_tokens": 1}
    return json.dumps(body, ensure_ascii=False).encode()


def _surrogates(chance: random.Random) -> bytes:
    text = chance.choice([r"\ud800", r"\udfff\ud800", r"a\udc00b", r"\ud83c"])
    name = chance.choice(["prompt", "model", "user", "stop", text])
    return f'{{"model": "tiny", "prompt": "a", "messages": [], "tokens": -1, "{name}": "{text}"}}'.encode()


def _deep(chance: random.Random) -> bytes:
    opening, middle, closing = chance.choice([("[", "", "]"), ('{"a":', "1", "}"), ('[{"a":', "1", "}]")])
    deep = opening * 10_000 + middle + closing * 10_000
    return chance.choice(
        [deep, f'{{"model": "tiny", "prompt": {deep}}}', f'{{"messages": {deep}}}', deep[:9000]]
    ).encode()


def _model(server: Running, chance: random.Random) -> bytes:
    name = chance.choice(["../tiny", "..", "../../etc/passwd", "tiny/..", "%2e%2e%2ftiny", "tiny\\u0000", "TINY", ""])
    if chance.random() < 0.5:
        return server.request("GET", f"/v1/models/{name or 'x'}")
    body = f'{{"model": "{name}", "prompt": "a", "tokens": [1]}}'.encode()
    return server.request("POST", chance.choice(["/v1/completions", "/v1/tokenize"]), body)


def _http(server: Running, chance: random.Random) -> bytes:
    good = b'{"model": "tiny", "prompt": "a"}'
    return chance.choice(
        [
            server.request("POST", "/v1/completions", good, content_type="text/plain"),
            server.request("POST", "/v1/completions", good, content_encoding="gzip"),
            server.request("POST", "/v1/completions", good, authorization="Bearer gm-" + "0" * 72),
            server.request("POST", "/v1/completions", good, content_length=str(2**40)),
            server.request("POST", "/v1/completions", good, content_length="-1"),
            server.request("POST", "/v1/completions", good, x="y" * 70_000),
            server.request("PUT", "/v1/completions", good),
            server.request("GET", "/v1/../../etc/passwd"),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        ]
    )


KINDS: dict[str, tuple[float, Callable[[Running, random.Random], bytes]]] = {
    "no JSON": (20, _posted(lambda chance: chance.choice([b"", b"{", b'{"a"', b"\xff\xfe", chance.randbytes(200)]))),
    "no object": (10, _posted(lambda chance: chance.choice([b"[]", b"1", b'"a"', b"null", b"true", b"[{}]"]))),
    "wrong types": (30, _posted(_wrong_type)),
    "no numbers": (15, _posted(_no_number)),
    "a megabyte": (2, lambda server, chance: server.request("POST", "/v1/completions", _megabyte(chance))),
    "lone surrogates": (8, _posted(_surrogates)),
    "depth 10,000": (5, _posted(_deep)),
    "unknown models": (5, _model),
    "no such HTTP": (5, _http),
}


# ---- those who leave, those who are too many, those who are slow ---------------------------------------------


def disconnects(server: Running, share: float) -> list[Row]:
    return asyncio.run(_disconnects(server, round(1000 * share)))


async def _disconnects(server: Running, count: int) -> list[Row]:
    chance = random.Random(0)

    async def leave() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        settings = {"max_tokens": 1500, "n": chance.choice([1, 1, 1, 3]), "stream": chance.random() < 0.8}
        writer.write(server.completion(**settings, logit_bias={"65": 100}))
        if settings["stream"]:
            read = 0
            while read < chance.choice([1, 2000, 20_000]):
                read += len(await reader.read(4096))
        else:
            await asyncio.sleep(chance.random() / 10)
        if chance.random() < 0.5:  # with a reset
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    await together([leave() for _ in range(count)], 48)
    took = await server.until_idle(30)
    assert (await server.ask(server.completion(**GOOD))).status == 200
    return [("clients that leave in the middle", f"{count:,}", f"blocks in use are 0 within {took:.2f} s of the last")]


def overload(server: Running, share: float) -> list[Row]:
    return asyncio.run(_overload(server))


async def _overload(server: Running) -> list[Row]:
    """From the first token to the last of 64: as many ask as have room in a step, and ten times as many."""
    request = server.completion(max_tokens=64, stream=True, logit_bias={"65": 100})
    full: list[Answer] = await asyncio.gather(*(server.ask(request) for _ in range(MAX_RUNNING)))
    asked = [asyncio.ensure_future(server.ask(request)) for _ in range(10 * MAX_RUNNING)]
    most = 0
    while not all(one.done() for one in asked):
        answer = await server.ask(server.request("GET", "/v1/load"))
        if answer.status == 200:  # the look at the load may be one too many itself
            load = json.loads(answer.body)
            assert load["running"] <= MAX_RUNNING
            most = max(most, load["running"] + load["waiting"])
        await asyncio.sleep(0.05)
    many = [one.result() for one in asked]
    served = [answer for answer in many if answer.status == 200]
    refused = [answer for answer in many if answer.status == 503]
    assert len(served) + len(refused) == len(many), Counter(answer.status for answer in many)
    assert all(answer.said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for answer in served)
    assert all(b"retry-after: 1\r\n" in answer.head for answer in refused)
    assert most <= MAX_REQUESTS
    assert len(served) > MAX_REQUESTS / 2
    await server.until_idle(30)
    saying = [statistics.median(answer.whole_s - answer.first_s for answer in some) for some in (full, served)]
    waited = max(answer.first_s for answer in served)
    return [
        (
            "ten times the streams that have room in a step",
            f"{len(many)} at once",
            f"{len(served)} answered in full, {len(refused)} told 503 with Retry-After; at most {most} in the engine "
            f"and its queue; from the first token to the 64th {saying[1]:.2f} s (median; {saying[0]:.2f} s when just "
            f"as many ask as have room), the last first token after {waited:.1f} s",
        )
    ]


def slow(server: Running, share: float) -> list[Row]:
    return asyncio.run(_slow(server))


async def _slow(server: Running) -> list[Row]:
    """40 who read nothing of a long answer, 60 who say nothing, 50 with half a header, 50 with half a body; beside them
    one who asks as usual, compared with the same beside 40 who read."""
    long = server.completion(max_tokens=1900, stream=True, logprobs=20, logit_bias={"65": 100})
    usual = server.completion(max_tokens=32, stream=True, logit_bias={"65": 100})
    readers = [asyncio.ensure_future(server.ask(long)) for _ in range(40)]
    while (await server.load())["running"] < 40:
        await asyncio.sleep(0.02)
    beside_readers = [await server.ask(usual) for _ in range(5)]
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await server.until_idle(30)
    half = server.request("POST", "/v1/completions", b'{"model": "tiny"', content_length="100")
    sent = [long] * 40 + [b""] * 60 + [b"GET /v1/models HTTP/1.1\r\nhost:"] * 50 + [half] * 50
    started, sockets = time.monotonic(), []
    for part in sent:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(part)
        sockets.append(connection)
    while (await server.load())["running"] < 40:
        await asyncio.sleep(0.02)
    beside_slow = [await server.ask(usual) for _ in range(5)]
    assert all(answer.is_whole for answer in beside_slow)
    await server.until_idle(120)
    idle = [connection for connection, part in zip(sockets, sent, strict=True) if part != long]
    ended = [await asyncio.to_thread(_is_ended, connection, 60) for connection in idle]
    assert all(ended), ended.count(False)
    took = time.monotonic() - started
    for connection in sockets:
        connection.close()
    medians = [statistics.median(a.whole_s for a in some) for some in (beside_slow, beside_readers)]
    said = f"an answer of 32 tokens beside them takes {medians[0]:.2f} s, {medians[1]:.2f} s beside 40 who read; "
    return [("slow readers and idle connections", f"{len(sent)}", said + f"nothing of them is left after {took:.0f} s")]


def _is_ended(connection: socket.socket, seconds: float) -> bool:
    """By the server, with or without a word."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


# ---- kill -9 --------------------------------------------------------------------------------------------


def kills(model: Path, folder: Path, share: float) -> list[Row]:
    """Six keys ask all the time, and the server is killed in the middle: who has an answer in full is in the table."""
    chance, file = random.Random(0), folder / "kills.sqlite"
    database = Database(str(file))
    secrets = {f"key-{n}": keys.create(database, f"key-{n}", Limits()) for n in range(6)}
    before: Counter[str] = Counter()
    whole = 0
    count = max(1, round(10 * share))
    for _ in range(count):
        with running(model, file, "") as server:
            got = asyncio.run(_until_killed(server, secrets, chance.randint(10, 200), chance))
        now = Counter({line.key: line.requests for line in used(database)})
        for name in secrets:
            new = now[name] - before[name]
            assert got[name] <= new <= got[name] + 1, (name, got[name], new)  # one may be on its way
        before, whole = now, whole + got.total()
    database.close()
    cut_off = before.total() - whole
    said = f"{whole:,} answers came in full: all are in the table of usage, with {cut_off} that were cut off"
    return [("kill -9 of the server while six keys ask", str(count), said)]


async def _until_killed(server: Running, secrets: dict[str, str], enough: int, chance: random.Random) -> Counter[str]:
    got: Counter[str] = Counter()

    async def ask_on(name: str) -> None:
        mine = Running(server.process, server.port, secrets[name])
        while True:
            settings = {"max_tokens": chance.randint(1, 12), "stream": chance.random() < 0.5}
            try:
                answer = await mine.ask(mine.completion(**settings))
            except (OSError, EOFError):
                return
            if not answer.is_whole:
                return
            assert answer.status == 200, answer
            got[name] += 1
            if got.total() >= enough:
                server.process.send_signal(signal.SIGKILL)

    await asyncio.gather(*map(ask_on, secrets))
    return got


PARTS: dict[str, Callable[[Running, float], list[Row]]] = {
    "schema": by_schema,
    "malformed": malformed,
    "disconnects": disconnects,
    "overload": overload,
    "slow": slow,
}

LIMITS = {"schema": Limits(output_tokens_per_minute=3000)}  # a schema allows 128 answers of the whole context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the number of requests")
    parser.add_argument("--only", nargs="*", help=f"some of: {', '.join(PARTS)}, kills")
    parser.add_argument("--table", type=Path, help="a Markdown file whose table of the endpoint is written anew")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model")
        for part in [*PARTS, "kills"]:
            if args.only and part not in args.only:
                continue
            started = time.monotonic()
            if part == "kills":
                made = kills(model, folder, args.share)
            else:
                file = folder / f"{part}.sqlite"
                database = Database(str(file))
                key = keys.create(database, "alice", LIMITS.get(part, Limits()), is_operator=True)
                database.close()
                with running(model, file, key) as server:
                    made = PARTS[part](server, args.share)
            print(*("| " + " | ".join(row) + " |" for row in made), f"{time.monotonic() - started:.0f} s", flush=True)
            rows += made
    if args.table:
        lines = [
            "| what | how many | what happened |",
            "|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
        before, rest = args.table.read_text().split(BEGIN)
        args.table.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{rest.split(END)[1]}"]))


if __name__ == "__main__":
    main()
