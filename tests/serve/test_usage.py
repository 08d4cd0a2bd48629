"""Usage: what was acknowledged is there once, whatever is killed or breaks; costs are exact."""

import csv
import io
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, select

from gristmill.errors import Failure, InputError
from gristmill.serve import keys
from gristmill.serve.database import Database, groups
from gristmill.serve.limits import Limits
from gristmill.serve.usage import Prices, Usage, Used, usage_csv, usage_text, used

NUM_KILLS = int(os.environ.get("GRISTMILL_KILLS", "4"))
CHILD = Path(__file__).with_name("usage_child.py")
DAY = "2026-01-31"


def requests(database: Database) -> dict[str, int]:
    return {line.key: line.requests for line in used(database)}


@pytest.mark.timeout(60 + 10 * NUM_KILLS)
def test_killed_at_any_moment_every_acknowledged_request_is_there_once(tmp_path: Path) -> None:
    chance, file, num_threads = random.Random(0), tmp_path / "serve.sqlite", 6
    before: dict[str, int] = {}
    for _ in range(NUM_KILLS):
        command = [sys.executable, str(CHILD), str(file), str(num_threads)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(chance.randint(1, 150))]
        child.send_signal(signal.SIGKILL)
        told += child.stdout.read().splitlines(keepends=True)
        assert child.wait() == -signal.SIGKILL
        acknowledged = Counter(f"key-{line.strip()}" for line in told if line.endswith("\n"))
        database = Database(str(file))
        lines = used(database)
        database.close()
        for line in lines:
            new = line.requests - before.get(line.key, 0)
            # the one on its way may be in the table before it was told
            assert acknowledged[line.key] <= new <= acknowledged[line.key] + 1
            assert (line.input_tokens, line.output_tokens) == (3 * line.requests, 5 * line.requests)
        assert acknowledged.keys() <= {line.key for line in lines}
        before = {line.key: line.requests for line in lines}
    assert sum(before.values()) > NUM_KILLS


class Unsteady(Database):
    """Lets `broken` commits fail; those in `after` were made nevertheless."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self.broken, self.after, self.num_commits = 0, False, 0
        self.failed = threading.Event()
        self.may_go = threading.Event()
        self.may_go.set()

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        if threading.current_thread().name != "usage":
            with super().begin() as connection:
                yield connection
            return
        self.may_go.wait()
        self.num_commits += 1
        is_broken, self.broken = self.broken > 0, self.broken - 1
        if is_broken and not self.after:
            self.failed.set()
            raise Failure("the disk is full")
        with super().begin() as connection:
            yield connection
        if is_broken:
            self.failed.set()
            raise Failure("the connection broke during the commit")


@pytest.mark.parametrize("after", [False, True])
def test_a_commit_that_fails_is_made_again_and_counts_once(tmp_path: Path, after: bool) -> None:
    database = Unsteady(tmp_path / "serve.sqlite")
    database.broken, database.after = 3, after
    usage = Usage(database, Prices(), retry_s=0.01)
    done = usage.record("k", "m", DAY, 1, 2)
    assert database.failed.wait(20)
    done.result(20)
    assert usage.problem is None
    usage.record("k", "m", DAY, 1, 2).result(20)
    usage.close()
    assert requests(database) == {"k": 2}
    with database.begin() as connection:
        assert connection.execute(select(groups)).all() == []  # nothing is left of how it was done


def test_while_nothing_can_be_written_it_says_so_and_the_end_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Unsteady(tmp_path / "serve.sqlite")
    database.broken = 10**9
    usage = Usage(database, Prices(), retry_s=1000)
    done = usage.record("k", "m", DAY, 1, 2)
    assert database.failed.wait(20)
    assert not done.done()
    with pytest.raises(Failure, match="usage was not written: the disk is full"):
        usage.close()
    with pytest.raises(Failure, match="the disk is full"):
        done.result(20)
    assert [record.message for record in caplog.records] == [
        "usage cannot be written, and is tried again: the disk is full"  # once, not for each try
    ]
    with pytest.raises(Failure, match="the server ends"):
        usage.record("k", "m", DAY, 1, 2).result(20)


def test_what_ends_together_is_committed_together(tmp_path: Path) -> None:
    database = Unsteady(tmp_path / "serve.sqlite")
    usage = Usage(database, Prices())
    database.may_go.clear()
    done = [usage.record(f"k{number % 7}", "m", DAY, 1, 2) for number in range(100)]
    database.may_go.set()
    for one in done:
        one.result(20)
    assert database.num_commits <= 2
    assert sum(requests(database).values()) == 100
    usage.close()


def test_servers_that_share_a_database_add_up(tmp_path: Path) -> None:
    file = str(tmp_path / "serve.sqlite")
    servers = [Usage(Database(file), Prices()) for _ in range(3)]

    def work(usage: Usage) -> None:
        for number in range(20):
            usage.record(f"k{number % 2}", "m", DAY, 1, 2).result(60)

    threads = [threading.Thread(target=work, args=(usage,)) for usage in servers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for usage in servers:
        usage.close()
    assert requests(Database(file)) == {"k0": 60, "k1": 60}


prices = st.decimals(0, 1000, places=4)


@given(prices, prices, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20))
def test_costs_are_exact_to_the_last_digit(a: Decimal, b: Decimal, todo: list[tuple[int, int]]) -> None:
    price = Prices(input=a, output=b)
    exact = sum((a * i + b * o for i, o in todo), Decimal(0)) / 10**6
    assert sum(price.cost_e10(i, o) for i, o in todo) * Decimal("1e-10") == exact


def test_lines_are_by_day_key_and_model_and_a_spreadsheet_reads_them(database: Database) -> None:
    alice = keys.create(database, "alice", Limits())[3:11]
    bob = keys.create(database, "bob", Limits())[3:11]
    usage = Usage(database, Prices(input=Decimal("0.15"), output=Decimal("0.6")))
    for key, model, day, asked, said in (
        *((alice, "m", "2026-02-01", 1000, 10), (alice, "m", "2026-02-01", 500, 5), (bob, "m", "2026-02-01", 1, 0)),
        *((alice, 'a "b", c', "2026-02-01", 1, 1), (alice, "m", "2026-01-31", 7, 7)),
    ):
        usage.record(key, model, day, asked, said)
    usage.close()
    keys.revoke(database, "alice")  # which changes nothing of what was used
    again = keys.create(database, "alice", Limits())[3:11]
    usage = Usage(database, Prices(output=Decimal(2)))  # other prices from now on
    usage.record(again, "m", "2026-02-01", 0, 1_000_000)
    usage.close()
    lines = used(database)
    assert lines[3] == Used(
        day="2026-02-01",
        key="bob",
        model="m",
        requests=1,
        input_tokens=1,
        output_tokens=0,
        cost=Decimal("0.00000015"),
    )
    assert list(csv.reader(io.StringIO(usage_csv(lines)))) == [
        ["day", "key", "model", "requests", "input_tokens", "output_tokens", "cost"],
        ["2026-01-31", "alice", "m", "1", "7", "7", "0.00000525"],
        ["2026-02-01", "alice", 'a "b", c', "1", "1", "1", "0.00000075"],
        ["2026-02-01", "alice", "m", "3", "1500", "1000015", "2.000234"],
        ["2026-02-01", "bob", "m", "1", "1", "0", "0.00000015"],
    ]
    told = usage_text(lines)
    assert len({len(line) for line in told}) == 1
    assert told[3].split() == ["2026-02-01", "alice", "m", "3", "1,500", "1,000,015", "2.000234"]


@pytest.mark.parametrize("price", ["-1", "NaN", "Infinity", "0.00001", "1000001"])
def test_a_price_that_cannot_be_added_exactly_is_refused(price: str) -> None:
    with pytest.raises(InputError, match="the price of input tokens"):
        Prices(input=Decimal(price))
