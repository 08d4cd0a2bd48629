"""The gate as the server meets it: statuses, headers, and what is in the table when `finish` has returned."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gristmill.errors import Failure
from gristmill.serve import keys
from gristmill.serve.database import Database
from gristmill.serve.errors import ApiError
from gristmill.serve.gate import Gate
from gristmill.serve.limits import Limits
from gristmill.serve.usage import used


@pytest.fixture
def clock() -> SimpleNamespace:
    return SimpleNamespace(now=1000.0)


@pytest.fixture
def gate(database: Database, clock: SimpleNamespace) -> Iterator[Gate]:
    gate = Gate(database, clock=lambda: clock.now)
    yield gate
    gate.close()


async def refusal(awaited: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await awaited  # type: ignore[misc]
    return caught.value


def test_who_has_no_right_key_gets_401_and_a_word_on_what_to_do(gate: Gate, database: Database) -> None:
    made = keys.create(database, "alice", Limits())

    async def story() -> None:
        for header in (
            None,
            "",
            "Bearer",
            "Bearer ",
            f"Basic {made}",
            made,
            f"Bearer {made[:-1]}x",
            f"Bearer {made} x",
        ):
            refused = await refusal(gate.identify(header))
            assert (refused.status, refused.code) == (401, "invalid_api_key")
            assert refused.headers == {"www-authenticate": "Bearer"}
            assert made[11:] not in refused.message
        for header in (f"Bearer {made}", f"bearer  {made} "):
            assert await gate.identify(header) == made[3:11]
        keys.revoke(database, "alice")  # holds for the very next request
        refused = await refusal(gate.identify(f"Bearer {made}"))
        assert refused.status == 401
        assert "was revoked on" in refused.message

    asyncio.run(story())


def test_a_limit_is_429_with_a_time_and_the_budget_and_what_is_not_used_comes_back(
    gate: Gate, database: Database, clock: SimpleNamespace
) -> None:
    made = keys.create(database, "alice", Limits(output_tokens_per_minute=100))

    async def story() -> None:
        tenant = await gate.identify(f"Bearer {made}")
        assert gate.most_tokens(tenant) == 100
        first = await gate.admit(tenant, "m", 10, 80)
        assert first.headers["x-ratelimit-remaining-output-tokens"] == "20"
        clock.now += 12.5
        refused = await refusal(gate.admit(tenant, "m", 10, 30))
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "48"
        assert refused.headers["x-ratelimit-remaining-output-tokens"] == "20"
        await first.finish(10, 70)
        second = await gate.admit(tenant, "m", 10, 30)
        second.release()
        second.release()
        await second.finish(10, 30)  # too late: it never was
        third = await gate.admit(tenant, "m", 10, 30)
        await third.finish(10, 0)
        refused = await refusal(gate.admit(tenant, "m", 10, 101))
        assert (refused.status, refused.code) == (400, "request_exceeds_limit")
        assert "retry-after" not in refused.headers
        assert [(line.requests, line.input_tokens, line.output_tokens) for line in used(database)] == [(2, 20, 70)]

    asyncio.run(story())


def test_keys_do_not_take_from_each_other(gate: Gate, database: Database) -> None:
    made = [keys.create(database, name, Limits(parallel_requests=1)) for name in ("alice", "bob")]

    async def story() -> None:
        alice, bob = [await gate.identify(f"Bearer {key}") for key in made]
        await gate.admit(alice, "m", 1, 1)
        assert (await refusal(gate.admit(alice, "m", 1, 1))).headers["retry-after"] == "1"
        await gate.admit(bob, "m", 1, 1)

    asyncio.run(story())


class Held(Database):
    """Its writer waits until it may go."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self.may_go = threading.Event()
        self.waits = threading.Event()
        self.is_broken = False

    def begin(self):  # type: ignore[no-untyped-def]
        if threading.current_thread().name == "usage":
            self.waits.set()
            self.may_go.wait(20)
        if self.is_broken:
            raise Failure("gone")
        return super().begin()


def test_finish_returns_after_the_commit_and_one_who_leaves_does_not_undo_it(tmp_path: Path) -> None:
    database = Held(tmp_path / "serve.sqlite")
    made, gate = keys.create(database, "alice", Limits()), Gate(database)

    async def story() -> None:
        tenant = await gate.identify(f"Bearer {made}")

        async def begin() -> "asyncio.Task[None]":
            """A finish that waits for the writer."""
            database.may_go.clear()
            database.waits.clear()
            admission = await gate.admit(tenant, "m", 1, 10)
            finishing = asyncio.ensure_future(admission.finish(1, 10))
            await asyncio.to_thread(database.waits.wait, 20)
            assert not finishing.done()
            return finishing

        finishing = await begin()
        database.may_go.set()
        await finishing
        assert used(database)[0].requests == 1
        finishing = await begin()
        finishing.cancel()  # the client has gone
        with pytest.raises(asyncio.CancelledError):
            await finishing
        database.may_go.set()
        await (await gate.admit(tenant, "m", 1, 10)).finish(1, 10)  # and the writer goes on
        assert used(database)[0].requests == 3

    asyncio.run(story())
    gate.close()


def test_work_that_could_not_be_written_down_is_not_begun(tmp_path: Path) -> None:
    database = Held(tmp_path / "serve.sqlite")
    made, gate = keys.create(database, "alice", Limits()), Gate(database)

    async def story() -> None:
        tenant = await gate.identify(f"Bearer {made}")
        gate._usage.problem = "the disk is full"
        refused = await refusal(gate.admit(tenant, "m", 1, 10))
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert gate.problem == refused.message  # the disk is the server's own matter
        assert "disk" not in refused.message
        database.is_broken = True
        assert (await refusal(gate.identify(f"Bearer {made}"))).status == 503

    asyncio.run(story())
