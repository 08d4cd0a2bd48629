"""The server as its clients and its operator meet it: keys, limits of patience, those who leave, and its own end."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from running_server import HTTP, Direct, Running

from gristmill.errors import InputError
from gristmill.serve import keys
from gristmill.serve.config import ServeConfig
from gristmill.serve.database import Database
from gristmill.serve.gate import Gate
from gristmill.serve.limits import Limits
from gristmill.serve.start import check_address, open_gate, serve
from gristmill.serve.usage import used

LONG: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "logit_bias": {"65": 100}, "stream": True}


def until(is_so: Callable[[], bool]) -> None:
    """Waits for what another thread is about to do."""
    for _ in range(3000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to be")


def is_idle(running: Running) -> bool:
    load = running.at.worker.load
    return (load.running, load.waiting, load.blocks_in_use, running.at.num_requests) == (0, 0, 0, 0)


@pytest.fixture
def gated(serving: Any, database: Database) -> Iterator[Running]:
    with serving(gate=Gate(database), half_closed_s=0.2) as running:
        yield running


def test_every_route_of_the_schema_but_health_and_readiness_asks_for_a_key(gated: Running, database: Database) -> None:
    key = keys.create(database, "alice", Limits())
    schema = gated.get("/openapi.json", headers={"authorization": f"Bearer {key}"}).json()
    paths = [*schema["paths"], "/openapi.json", "/nowhere"]
    assert len(paths) > 10
    for path in paths:
        for method in schema["paths"].get(path, {"get": {}}):
            for bad in (
                {},
                {"authorization": "Bearer gm-wrong"},
                {"authorization": f"Basic {key}"},
                {"authorization": ""},
            ):
                answer = HTTP.request(method, gated.url + path.replace("{model}", "tiny"), headers=bad)
                if path in ("/health", "/ready"):
                    assert answer.json() == {"status": "ok"}
                else:
                    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                    assert answer.headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        gated.client("sk-wrong").models.list()
    assert gated.client(key).models.list().data[0].id == "tiny"


def test_what_a_key_has_used_is_in_the_table_when_the_answer_is_there(gated: Running, database: Database) -> None:
    client = gated.client(keys.create(database, "alice", Limits()))
    whole = client.completions.create(model="tiny", prompt="a", max_tokens=5, n=2)
    chunks = list(
        client.completions.create(
            model="tiny", prompt="a", max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    told = [whole.usage, chunks[-1].usage]
    [line] = used(database)
    assert (line.requests, line.key, line.model) == (2, "alice", "tiny")
    assert line.input_tokens == sum(usage.prompt_tokens for usage in told if usage)
    assert line.output_tokens == sum(usage.completion_tokens for usage in told if usage)


def test_a_limit_of_a_key_is_429_with_a_time_and_the_budget(gated: Running, database: Database) -> None:
    client = gated.client(keys.create(database, "alice", Limits(output_tokens_per_minute=20)))
    # What an answer leaves of its limit is credited back, so this one must not end early.
    unending = {"ignore_eos": True}
    answer = client.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=15, extra_body=unending)
    assert answer.headers["x-ratelimit-limit-output-tokens"] == "20"
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=15)
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 60
    with pytest.raises(openai.BadRequestError, match="lower max_tokens"):
        client.completions.create(model="tiny", prompt="a", max_tokens=21)


def test_who_leaves_in_the_middle_is_cancelled_and_pays_for_what_was_made(gated: Running, database: Database) -> None:
    key = keys.create(database, "alice", Limits())
    for stream in (True, False):
        with socket.create_connection(("127.0.0.1", int(gated.url.rpartition(":")[2]))) as connection:
            body = json.dumps({**LONG, "stream": stream}).encode()
            connection.sendall(head(len(body), key) + body)
            until(lambda: gated.at.worker.load.running > 0)
            if stream:
                connection.recv(1)
        until(lambda: is_idle(gated))
    [line] = used(database)
    assert line.requests == 2
    assert 0 < line.output_tokens < 4000
    assert gated.at.metrics.finishes["cancelled"] == 2


def head(length: int, key: str = "") -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def test_many_who_leave_leave_nothing_behind(server: Running) -> None:
    async def leave(client: httpx2.AsyncClient) -> None:
        async with client.stream("POST", f"{server.url}/v1/completions", json=LONG) as answer:
            await anext(answer.aiter_bytes())

    async def story() -> None:
        async with httpx2.AsyncClient(timeout=60) as client:
            await asyncio.gather(*(leave(client) for _ in range(50)))

    asyncio.run(story())
    until(lambda: is_idle(server))
    finishes = server.at.metrics.finishes
    assert finishes["cancelled"] >= 50


def test_who_does_not_read_holds_nobody_and_is_let_go(serving: Any, direct: Direct) -> None:
    [(expected, _, _)] = direct.ask(direct.text_ids("a"))  # now: two engines of one model cannot run at once
    with serving(stall_s=0.5, max_backlog=10_000) as running, closing(socket.socket()) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        lazy.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        body = json.dumps({**LONG, "logprobs": 20, "prompt": ["a"] * 4, "n": 8}).encode()
        lazy.sendall(head(len(body)) + body)
        until(lambda: running.at.worker.load.running > 0)
        text = running.client().completions.create(model="tiny", prompt="a", temperature=0).choices[0].text
        assert text == expected
        until(lambda: is_idle(running))


def test_a_backlog_that_is_full_ends_its_request_alone(serving: Any) -> None:
    with serving(max_backlog=3) as running:
        answer = running.post("/v1/completions", {**LONG, "n": 8, "max_tokens": 3})  # 8 pieces a step
        assert answer.content.endswith(b"\n\n")
        assert (
            "waited to be read"
            in json.loads(answer.content.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["message"]
        )
        until(lambda: is_idle(running))
        assert running.post("/v1/completions", {**LONG, "max_tokens": 2}).content.endswith(b"[DONE]\n\n")


def test_who_sends_no_request_or_no_body_is_let_go(serving: Any) -> None:
    with serving(header_s=0.3, body_s=0.3) as running:
        address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
        for sent in (b"", b"GET / HTTP/1.1\r\nhost: lo"):
            with socket.create_connection(address, timeout=20) as idle:
                idle.sendall(sent)
                assert is_closed(idle)
        with socket.create_connection(address, timeout=20) as slow:
            slow.sendall(head(100) + b"{")
            assert b"408 Request Timeout" in heard(slow, b"}}")
        with socket.create_connection(address, timeout=20) as kept:  # the second request of a connection, too
            kept.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b'"ok"' in heard(kept, b"}")
            kept.sendall(b"GET /health HT")
            assert is_closed(kept)
        with socket.create_connection(address, timeout=20) as wrong:
            wrong.sendall(b"hello\r\n\r\n")
            assert b'"type": "invalid_request_error"' in heard(wrong, b"}}")
        with socket.create_connection(address, timeout=20) as large:
            large.sendall(b"GET / HTTP/1.1\r\nx: " + b"x" * 70_000)
            assert b"400 Bad Request" in heard(large, b"}}")


def heard(connection: socket.socket, end: bytes) -> bytes:
    """All up to `end`, which may come in parts."""
    said = b""
    while not said.endswith(end):
        said += connection.recv(65536) or end
    return said


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_an_answer_that_takes_too_long_ends_with_an_error(serving: Any) -> None:
    with serving(request_s=0.2) as running:
        answer = running.post("/v1/completions", {**LONG, "stream": False})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="not complete after"):
            list(running.client().completions.create(**LONG))
        until(lambda: is_idle(running))


def test_when_it_is_full_it_says_so_and_admitted_requests_are_answered(serving: Any, served: Any) -> None:
    with serving(served(max_running=1, max_waiting=1)) as running:

        async def story() -> list[httpx2.Response]:
            async with httpx2.AsyncClient(timeout=60) as client:
                body = {**LONG, "stream": False, "max_tokens": 100}
                return await asyncio.gather(
                    *(client.post(f"{running.url}/v1/completions", json=body) for _ in range(12))
                )

        found = asyncio.run(story())
        statuses = {answer.status_code for answer in found}
        assert statuses == {200, 503}
        for answer in found:
            if answer.status_code == 503:
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["type"] == "server_error"
        until(lambda: is_idle(running))


def test_a_request_of_more_answers_than_may_wait_is_answered(serving: Any, served: Any) -> None:
    with serving(served(max_running=1, max_waiting=1)) as running:
        answer = running.post("/v1/completions", {**LONG, "stream": False, "max_tokens": 3, "n": 5})
        assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["length"] * 5


def test_a_key_with_many_requests_does_not_stand_before_another_key(
    serving: Any, served: Any, database: Database
) -> None:
    with serving(served(max_running=1), gate=Gate(database)) as running, ThreadPoolExecutor(8) as pool:
        ended: list[str] = []

        def ask(name: str, key: str) -> None:
            body = {**LONG, "max_tokens": 100, "stream": False}
            assert running.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"}).is_success
            ended.append(name)

        alice, bob = (keys.create(database, name, Limits()) for name in ("alice", "bob"))
        asked = [pool.submit(ask, "alice", alice) for _ in range(6)]
        until(lambda: running.at.worker.load.waiting == 5)
        asked.append(pool.submit(ask, "bob", bob))
        for one in asked:
            one.result()
    assert ended.index("bob") <= 2  # after the one that ran and, by chance of time, its follower


def test_who_leaves_while_waiting_loses_the_place(serving: Any, served: Any) -> None:
    with serving(served(max_running=1), half_closed_s=0.2) as running:
        address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
        body = json.dumps(LONG).encode()
        with socket.create_connection(address) as first:
            first.sendall(head(len(body)) + body)
            until(lambda: running.at.worker.load.running == 1)
            with socket.create_connection(address) as second:
                second.sendall(head(len(body)) + body)
                until(lambda: running.at.worker.load.waiting == 1)
            until(lambda: running.at.worker.load.waiting == 0)
            assert running.at.worker.load.running == 1
        until(lambda: is_idle(running))


def test_a_prompt_is_found_in_the_cache_by_its_own_key_alone(gated: Running, database: Database) -> None:
    settings: Any = {"model": "tiny", "prompt": "a" * 100, "max_tokens": 1}
    alice, bob = (gated.client(keys.create(database, name, Limits())) for name in ("alice", "bob"))

    def cached(client: openai.OpenAI) -> int:
        usage = client.completions.create(**settings).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert [cached(alice), cached(alice), cached(bob)] == [0, 96, 0]


def test_without_keys_other_names_of_the_machine_are_refused(server: Running, gated: Running) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example"):
        assert server.get("/v1/models", headers={"host": host}).status_code == 403
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000", "[::1]"):
        assert server.get("/v1/models", headers={"host": host}).status_code == 200
    assert gated.get("/health", headers={"host": "model.example"}).status_code == 200


def test_no_page_of_another_origin_may_read(server: Running) -> None:
    answer = HTTP.options(f"{server.url}/v1/completions", headers={"origin": "https://evil.example"})
    assert answer.status_code == 405
    answer = server.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_public_address_without_keys_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_DATABASE", str(tmp_path / "keys.sqlite"))
    for host in ("0.0.0.0", "::", "192.0.2.1", "model.example"):
        with pytest.raises(InputError, match=r"gristmill keys create"):
            serve(tmp_path, ServeConfig(host=host))
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check_address(ServeConfig(host=host), open_gate(None))
    assert not (tmp_path / "keys.sqlite").exists()
    database = Database(str(tmp_path / "keys.sqlite"))
    keys.create(database, "alice", Limits())
    keys.revoke(database, "alice")
    check_address(ServeConfig(host="0.0.0.0"), open_gate(None))  # revoking the last key opens nothing


def test_metrics_are_prometheus_under_the_names_of_vllm(server: Running) -> None:
    before = figures(server.get("/metrics").text)
    server.post("/v1/completions", {**LONG, "stream": False, "max_tokens": 7, "n": 2})
    after = figures(server.get("/metrics").text)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:generation_tokens_total"] == 14
    assert grown["vllm:prompt_tokens_total"] == 2
    assert grown["vllm:time_to_first_token_seconds_count"] == grown["vllm:e2e_request_latency_seconds_count"] == 2
    assert grown["vllm:inter_token_latency_seconds_count"] == 12
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0
    load = server.get("/v1/load").json()
    assert load["generation_tokens"] == after["vllm:generation_tokens_total"]
    assert load["tokens_per_s"] > 0


def figures(text: str) -> dict[str, float]:
    """Of a text in Prometheus' format those without labels of their own; each line must be of its grammar."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) [a-z_:0-9]+ .+", line)
        else:
            parts = re.fullmatch(r'([a-z_:0-9]+)\{model_name="tiny"(,[a-z_]+="[^"]*")?\} (\S+)', line)
            assert parts, line
            if not parts[2]:
                found[parts[1]] = float(parts[3])
    return found


def test_the_schema_is_openapi_and_names_what_is_answered(server: Running) -> None:
    schema = server.get("/openapi.json").json()
    text = json.dumps(schema)
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in schema["components"]["schemas"]
    for path, methods in schema["paths"].items():
        for method, said in methods.items():
            assert "422" not in said["responses"]
            assert {"200", "500", "503"} <= set(said["responses"])
            assert ("requestBody" in said) == (method == "post")
            errors = [answer for status, answer in said["responses"].items() if status >= "400"]
            assert all(list(answer["content"]) == ["application/json"] for answer in errors)
            assert ("401" in said["responses"]) == (path not in ("/health", "/ready"))
    fields = schema["components"]["schemas"]["CompletionBody"]
    assert fields["additionalProperties"] is False
    assert "422" not in text


def test_a_broken_engine_is_said_at_once_to_all(serving: Any) -> None:
    with serving() as running:
        running.at.worker.engine.runner.run = None  # type: ignore[assignment]
        answer = running.post("/v1/completions", LONG)
        assert "the engine has stopped" in answer.text
        assert isinstance(running.at.worker.broken, TypeError)
        assert running.server.should_exit


@pytest.mark.parametrize(("drain_s", "is_finished"), [(60.0, True), (0.0, False)])
def test_what_runs_is_finished_after_sigterm_or_told_that_it_is_cut_off(
    serving: Any, drain_s: float, is_finished: bool
) -> None:
    with serving(drain_s=drain_s) as running, ThreadPoolExecutor() as pool:
        asked = pool.submit(running.post, "/v1/completions", {**LONG, "max_tokens": 300})
        until(lambda: running.at.worker.load.running > 0)
        running.server.handle_exit(signal.SIGTERM, None)
        said = asked.result().content
    assert said.endswith(b"[DONE]\n\n") == is_finished
    assert (b"shutting down" in said) == (not is_finished)


def test_the_command_serves_a_run_and_ends_with_0_after_sigterm(tiny_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_run), "--port", "0", "--name", "mine"]
    environment = {**os.environ, "GRISTMILL_DATABASE": str(tmp_path / "none.sqlite"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        assert "no keys" in said[1]
        curl = said[2].strip().split(" ", 1)[1]
        url = curl.split()[0]
        body = re.search(r"-d '(.*)'", curl)
        assert body
        with httpx2.stream(
            "POST",
            url,
            content=body[1][:-1] + ', "stream": true}',
            headers={"content-type": "application/json"},
            timeout=60,
        ) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
