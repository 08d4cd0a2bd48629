"""HTTP as clients other than OpenAI's speak it: HEAD, half-closed connections, large bodies, and errors that arrive."""

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from running_server import HTTP, Running
from test_server import LONG, head, is_idle, until

from gristmill.serve import keys, page
from gristmill.serve.database import Database
from gristmill.serve.gate import Gate
from gristmill.serve.limits import Limits
from gristmill.serve.usage import used

BODY: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0}


@contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=60) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    said = b""
    while part := connection.recv(65536):
        said += part
    return said


def test_head_is_get_without_a_body_on_every_route(serving: Any, database: Database) -> None:
    key = keys.create(database, "operator", Limits(), is_operator=True)
    with serving() as open_to_all, serving(gate=Gate(database)) as gated:
        paths = [p.replace("{model}", "tiny") for p, m in open_to_all.get("/openapi.json").json()["paths"].items()]
        for path in [*paths, *page.FILES, "/openapi.json", "/nowhere", "/v1/models/other"]:
            for running in (open_to_all, gated):
                for headers in ({}, {"authorization": f"Bearer {key}"}):
                    got = running.get(path, headers=headers)
                    headed = HTTP.head(running.url + path, headers=headers)
                    assert (headed.status_code, headed.content) == (got.status_code, b"")
                    names = {"content-type", "allow", "www-authenticate", "etag", "retry-after"}
                    assert [headed.headers.get(n) for n in names] == [got.headers.get(n) for n in names]
        for method in ("DELETE", "PUT"):
            answer = HTTP.request(method, f"{open_to_all.url}/health")
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
        with connected(open_to_all) as connection:  # the next request of the connection is heard
            for _ in range(2):
                connection.sendall(b"HEAD /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                said = b""
                while not said.endswith(b"\r\n\r\n"):
                    said += connection.recv(65536)
                assert said.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_client_that_shuts_its_sending_side_down_gets_its_answer(
    server: Running, stream: bool, version: bytes
) -> None:
    content = json.dumps({**BODY, "stream": stream}).encode()
    wanted = server.post("/v1/completions", BODY).json()["choices"][0]["text"]
    with connected(server) as connection:
        connection.sendall(head(len(content)).replace(b"HTTP/1.1", b"HTTP/" + version) + content)
        connection.shutdown(socket.SHUT_WR)
        started = time.monotonic()
        said = rest(connection)  # the server closes: there is nothing to wait for
        assert time.monotonic() - started < 30
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")
    assert (b"data: [DONE]" in said) == stream
    if not stream:
        assert json.loads(said.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == wanted


def test_requests_that_were_sent_together_before_the_shutdown_are_all_answered(server: Running) -> None:
    content = json.dumps(BODY).encode()
    with connected(server) as connection:
        connection.sendall((head(len(content)) + content) * 3)
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection).count(b"HTTP/1.1 200 OK\r\n") == 3


def test_a_long_answer_reaches_a_half_closed_client_and_one_that_is_gone_is_cancelled(serving: Any) -> None:
    with serving(half_closed_s=0.2) as running:
        content = json.dumps({**LONG, "stream": False, "max_tokens": 1500}).encode()
        with connected(running) as connection:
            connection.sendall(head(len(content)) + content)
            connection.shutdown(socket.SHUT_WR)
            *interim, final = rest(connection).replace(b"HTTP/1.1 200", b"\0HTTP/1.1 200").split(b"\0")
        assert set(b"".join(interim).split(b"\r\n\r\n")) <= {b"HTTP/1.1 100 Continue", b""}
        assert json.loads(final.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 1500
        assert running.at.metrics.finishes["cancelled"] == 0
        before = running.at.metrics.made_tokens
        for stream in (False, True):
            content = json.dumps({**LONG, "stream": stream, "n": 4}).encode()
            with connected(running) as connection:
                connection.sendall(head(len(content)) + content)
                connection.shutdown(socket.SHUT_WR)
                until(lambda: running.at.worker.load.running > 0)
            until(lambda: is_idle(running))
        assert running.at.metrics.finishes["cancelled"] == 8
        assert running.at.metrics.made_tokens - before < 2 * 4 * 2000


def sent_slowly(connection: socket.socket, body: bytes) -> None:
    """As a client that first sends all, then reads; without the error it would never end."""
    try:
        connection.sendall(body)
    except ConnectionError:
        pytest.fail("the connection was reset while the body was sent")


@pytest.mark.parametrize("refusal", ["too large", "no key", "no route", "no type", "no POST"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_error_reaches_a_client_that_sends_a_large_body_first(
    serving: Any, database: Database, refusal: str, chunked: bool
) -> None:
    with serving(gate=Gate(database)) as running:
        key = keys.create(database, "alice", Limits()) if refusal != "no key" else "gm-wrong"
        path = {"no route": "/nowhere", "no POST": "/v1/models"}.get(refusal, "/v1/completions")
        kind = "text/plain" if refusal == "no type" else "application/json"
        body = b" " * (48 << 20)
        length = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
        if chunked:
            body = b"".join(b"%x\r\n%s\r\n" % (1 << 20, body[: 1 << 20]) for _ in range(48)) + b"0\r\n\r\n"
        with connected(running) as connection:
            connection.sendall(
                f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {kind}\r\n"
                f"authorization: Bearer {key}\r\n{length}\r\n\r\n".encode()
            )
            sent_slowly(connection, body)
            said = rest(connection)
    status = {"too large": 413, "no key": 401, "no route": 404, "no type": 415, "no POST": 405}[refusal]
    assert said.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_client_that_waits_for_leave_to_send_a_large_body_is_refused_at_once(server: Running) -> None:
    with connected(server) as connection:
        connection.sendall(head(48 << 20)[:-2] + b"expect: 100-continue\r\n\r\n")
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 413 ")
    with connected(server) as connection:
        content = json.dumps(BODY).encode()
        connection.sendall(head(len(content))[:-2] + b"expect: 100-continue\r\nconnection: close\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(content)
        assert rest(connection).startswith(b"HTTP/1.1 200 OK")


def test_a_body_without_end_is_read_for_a_while_and_takes_no_ones_place(serving: Any) -> None:
    with serving(body_s=0.5, max_requests=1) as running, connected(running) as slow:
        slow.sendall(head(1 << 40) + b" " * 1000)
        time.sleep(0.1)
        assert running.post("/v1/completions", BODY).is_success
        assert rest(slow).startswith(b"HTTP/1.1 413 ")


def test_errors_of_the_engine_name_the_parameter(server: Running) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    for path, body, param in (
        ("/v1/completions", {**BODY, "prompt": [99999]}, "prompt"),
        ("/v1/completions", {**BODY, "temperature": 1e-9}, "temperature"),
        ("/v1/completions", {**BODY, "logit_bias": {"99999": 1}}, "logit_bias"),
        ("/v1/completions", {**BODY, "prompt": "a" * 9000}, "prompt"),
        ("/v1/chat/completions", {**chat, "temperature": 1e-9}, "temperature"),
        ("/v1/chat/completions", {**chat, "logit_bias": {"99999": 1}}, "logit_bias"),
        ("/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": "a" * 9000}]}, "messages"),
    ):  # fmt: skip
        answer = server.post(path, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Another process that writes, and does not end."""
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_holds_while_usage_cannot_be_written_and_it_is_written_later(
    serving: Any, tmp_path: Path, stream: bool
) -> None:
    file = tmp_path / "serve.sqlite"
    database = Database(str(file))
    key = keys.create(database, "alice", Limits())
    with serving(gate=Gate(database), request_s=0.5) as running:
        headers = {"authorization": f"Bearer {key}"}
        with locked(file):
            started = time.monotonic()
            answer = running.post("/v1/completions", {**BODY, "stream": stream}, headers=headers)
            assert time.monotonic() - started < 5
            if stream:
                error = json.loads(answer.content.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]
            else:
                assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
                error = answer.json()["error"]
            assert (error["code"], "usage" in error["message"]) == ("timeout", True)
            until(lambda: running.at.num_requests == 0)
        until(lambda: bool(used(database)))
        assert used(database)[0].requests == 1
        assert running.post("/v1/completions", BODY, headers=headers).is_success


def test_a_lookup_of_a_key_that_takes_too_long_is_503(serving: Any, database: Database) -> None:
    key = keys.create(database, "alice", Limits())
    gate, may_go = Gate(database), threading.Event()
    with serving(gate=gate, request_s=0.3) as running:
        before = database.begin
        database.begin = lambda: may_go.wait(20) and before()  # type: ignore[assignment, method-assign, return-value]
        try:
            answer = running.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        finally:
            may_go.set()
            database.begin = before  # type: ignore[method-assign]
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize("how", ["moved", "replaced", "deleted"])
def test_a_database_that_is_not_in_its_place_any_more_is_noticed(serving: Any, tmp_path: Path, how: str) -> None:
    file = tmp_path / "serve.sqlite"
    database = Database(str(file))
    key = keys.create(database, "alice", Limits())
    with serving(gate=Gate(database)) as running:
        headers = {"authorization": f"Bearer {key}"}
        assert running.post("/v1/completions", BODY, headers=headers).is_success
        aside = file.rename(tmp_path / "aside.sqlite")
        if how == "deleted":
            aside.unlink()
        if how == "replaced":
            other = Database(str(tmp_path / "other.sqlite"))
            keys.create(other, "mallory", Limits())
            other.close()
            (tmp_path / "other.sqlite").rename(file)
        answer = running.post("/v1/completions", BODY, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert running.get("/ready").status_code == 503
        if how != "deleted":
            aside.rename(file)
            assert running.get("/ready").status_code == 200
            assert running.post("/v1/completions", BODY, headers=headers).is_success
            assert used(database)[0].requests == 2


def test_a_key_reads_its_own_usage_and_an_operators_key_the_whole_server(serving: Any, database: Database) -> None:
    plain, other = (keys.create(database, name, Limits()) for name in ("alice", "bob"))
    operator = keys.create(database, "carol", Limits(), is_operator=True)
    alice, bob, carol = ({"authorization": f"Bearer {key}"} for key in (plain, other, operator))
    with serving(gate=Gate(database)) as running:
        for headers, n in ((alice, 2), (bob, 3), (alice, 1)):
            assert running.post("/v1/completions", {**BODY, "n": n}, headers=headers).is_success
        for headers, requests, made in ((alice, 2, 12), (bob, 1, 12), (carol, 0, 0)):
            told = running.get("/v1/usage", headers=headers).json()["data"]
            assert sum(line["requests"] for line in told) == requests
            assert sum(line["output_tokens"] for line in told) <= made
            assert {line["model"] for line in told} <= {"tiny"}
        for path in ("/metrics", "/v1/load"):
            for headers in (alice, bob):
                refused = running.get(path, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_scope_required")
                assert "tokens_total" not in refused.text
            assert running.get(path, headers=carol).is_success
            assert running.get(path).status_code == 401
        for headers, is_operator in ((alice, False), (carol, True)):
            assert running.get("/v1/models/tiny", headers=headers).json()["operator"] is is_operator
        assert "vllm:generation_tokens_total" in running.get("/metrics", headers=carol).text
    with serving() as running:  # without keys: open to this machine
        assert running.get("/metrics").is_success
        assert running.get("/v1/usage").json()["data"] == []
