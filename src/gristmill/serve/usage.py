"""What was used: requests, tokens and cost by key, model and day. A finished request is never lost from the table.

    done = usage.record(key_id, "my-model", day, input_tokens=12, output_tokens=80)
    done.result()             # or `await asyncio.wrap_future(done)`; then the last byte may go out

What is recorded is in the table, on the disk, when `done` is: a server that is killed loses no request whose last byte
a client has. One thread writes; what comes while it commits is committed together next (group commit), so a request
waits for two commits at most and neither tokens nor the engine wait for any.

Nothing is counted twice either. A connection can break during a commit, and then nobody knows whether it was made; so
each group leaves its name in the same transaction, and a second try finds it there.
"""

import csv
import io
import logging
import queue
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, fields
from decimal import Decimal

from sqlalchemy import Connection, and_, delete, func, insert, select, update

from gristmill.errors import Failure, InputError
from gristmill.serve.database import Database, groups, keys
from gristmill.serve.database import usage as table

UNIT = Decimal(1).scaleb(-10)  # costs are whole numbers of it: a price for a million tokens has at most 4 decimals
COUNTS = (table.c.requests, table.c.input_tokens, table.c.output_tokens, table.c.cost_e10)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """For a million tokens, in any currency."""

    input: Decimal = Decimal(0)
    output: Decimal = Decimal(0)

    def __post_init__(self) -> None:
        for name, price in (("input", self.input), ("output", self.output)):
            if not (price.is_finite() and 0 <= price <= 10**6 and price == round(price, 4)):
                raise InputError(
                    f"the price of {name} tokens, {price}, must be from 0 to 1,000,000 for a million of them, "
                    "with at most 4 decimals"
                )

    def cost_e10(self, input_tokens: int, output_tokens: int) -> int:
        return int(self.input * 10**4) * input_tokens + int(self.output * 10**4) * output_tokens


@dataclass(frozen=True, kw_only=True)
class Used:
    """A line of the table. key: its name."""

    day: str
    key: str
    model: str
    requests: int
    input_tokens: int
    output_tokens: int
    cost: Decimal


@dataclass(frozen=True)
class Finished:
    row: tuple[str, str, str]  # key id, model, day
    counts: tuple[int, ...]
    done: "Future[None]"


class Usage:
    """Any thread may record. `problem`: None, or why what is recorded cannot be written now; it is tried again until it
    can. Then no new work should be begun."""

    def __init__(self, database: Database, prices: Prices, retry_s: float = 1.0) -> None:
        self.problem: str | None = None
        self._database, self._prices, self._retry_s = database, prices, retry_s
        self._queue: queue.SimpleQueue[Finished | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="usage", daemon=True)
        self._thread.start()

    def record(self, key_id: str, model: str, day: str, input_tokens: int, output_tokens: int) -> "Future[None]":
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # who gives up waiting must not cancel what is being written
        counts = (1, input_tokens, output_tokens, self._prices.cost_e10(input_tokens, output_tokens))
        if self._closing.is_set():
            done.set_exception(Failure("usage is closed: the server ends"))
            return done
        self._queue.put(Finished((key_id, model, day), counts, done))
        return done

    def close(self) -> None:
        """Writes what is left, with one more try. Raises Failure when it cannot be written. What comes later fails."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join()
        if self.problem:
            raise Failure(f"usage was not written: {self.problem}")

    def _write_all(self) -> None:
        previous = None  # this writer's group before
        is_open = True
        while is_open:
            group = [self._queue.get()]
            while not self._queue.empty():
                group.append(self._queue.get())
            is_open = None not in group
            if finished := [one for one in group if one is not None]:
                previous = self._write(finished, previous)
        if previous is not None:
            with suppress(Failure), self._database.begin() as connection:
                connection.execute(delete(groups).where(groups.c.id == previous))

    def _write(self, finished: Sequence[Finished], previous: str | None) -> str:
        """Tries until it is written, and only once more when closing. The group's name."""
        sums: dict[tuple[str, str, str], tuple[int, ...]] = defaultdict(lambda: (0,) * len(COUNTS))
        for one in finished:
            sums[one.row] = tuple(a + b for a, b in zip(sums[one.row], one.counts, strict=True))
        name = secrets.token_hex(16)
        while True:
            is_last_try = self._closing.is_set()
            try:
                with self._database.begin() as connection:
                    if connection.execute(select(groups).where(groups.c.id == name)).first() is None:
                        _add(connection, name, previous, sums)
                break
            except Exception as problem:  # whatever it was: this thread must not end while requests wait for it
                if self.problem is None:
                    logging.getLogger(__name__).error("usage cannot be written, and is tried again: %s", problem)
                self.problem = str(problem)
                if is_last_try:
                    for one in finished:
                        one.done.set_exception(problem)
                    return name
                self._closing.wait(self._retry_s)
        self.problem = None
        for one in finished:
            one.done.set_result(None)
        return name


def _add(
    connection: Connection, name: str, previous: str | None, sums: Mapping[tuple[str, str, str], tuple[int, ...]]
) -> None:
    connection.execute(insert(groups).values(id=name))
    if previous is not None:
        connection.execute(delete(groups).where(groups.c.id == previous))
    for row, counts in sorted(sums.items()):  # in one order, or two servers could wait for each other's rows
        more = dict(zip(COUNTS, counts, strict=True))
        which = dict(zip((table.c.key_id, table.c.model, table.c.day), row, strict=True))
        same = and_(*(column == value for column, value in which.items()))
        raised = {column: column + count for column, count in more.items()}
        if not connection.execute(update(table).where(same).values(raised)).rowcount:
            connection.execute(insert(table).values({**which, **more}))


def used(database: Database, key_id: str | None = None) -> list[Used]:
    """By day, key and model; keys that had one name, one after the other, share a line. key_id: only this key's."""
    name = func.coalesce(keys.c.name, table.c.key_id).label("name")
    lines = select(table.c.day, name, table.c.model, *(func.sum(column) for column in COUNTS)).select_from(
        table.outerjoin(keys, keys.c.id == table.c.key_id)
    )
    if key_id is not None:
        lines = lines.where(table.c.key_id == key_id)
    with database.begin() as connection:
        found = connection.execute(lines.group_by(table.c.day, name, table.c.model)).all()
    rows = [(*row[:3], *map(int, row[3:6]), int(row[6]) * UNIT) for row in found]
    names = [field.name for field in fields(Used)]
    return [Used(**dict(zip(names, row, strict=True))) for row in sorted(rows)]


def usage_csv(lines: Iterable[Used]) -> str:
    """Comma-separated, with a header; costs are exact."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(field.name for field in fields(Used))
    writer.writerows([*list(vars(line).values())[:-1], plain(line.cost)] for line in lines)
    return out.getvalue()


def usage_text(lines: Sequence[Used]) -> list[str]:
    """The same for people: aligned, with thousands apart."""
    if not lines:
        return ["nothing used yet"]
    rows = [["day", "key", "model", "requests", "input tokens", "output tokens", "cost"]]
    for line in lines:
        counts = [f"{count:,}" for count in (line.requests, line.input_tokens, line.output_tokens)]
        rows.append([line.day, line.key, line.model, *counts, plain(line.cost)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def plain(cost: Decimal) -> str:
    """Without an exponent and without zeros at the end."""
    whole, _, rest = f"{cost:f}".partition(".")
    return f"{whole}.{rest.rstrip('0')}".removesuffix(".")
