"""Progress bars on standard error: a live bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(stderr=True, highlight=False, soft_wrap=True)
LOG_EVERY_S = 15.0  # in a log file: often enough to see life, seldom enough to read


@contextmanager
def quiet(on: bool) -> Iterator[None]:
    """While `on`, print nothing to the console: of several ranks only the first reports."""
    before, console.quiet = console.quiet, on
    try:
        yield
    finally:
        console.quiet = before


@contextmanager
def bar(what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """Yields advance(amount). `total` in whatever unit `advance` uses; None when it is not known."""
    if not console.is_terminal:
        yield _plain(what, total)
        return
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """Iterate under a bar that counts items."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with bar(what, total) as advance:
        for item in items:
            yield item
            advance(1)


def _plain(what: str, total: float | None) -> Callable[[float], None]:
    started = said = time.monotonic()
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal said, done
        done += amount
        now = time.monotonic()
        if now - said < LOG_EVERY_S:
            return
        said = now
        left = f", {(now - started) * (total - done) / done:.0f} s left" if total and done else ""
        share = f" {done / total:.0%}" if total else f" {done:,.0f}"
        print(f"  {what}{share}{left}", file=sys.stderr, flush=True)

    return advance


def data_size(num_bytes: float) -> str:
    """Decimal units, as disks have them: "31.0 kB", "4.2 MB"."""
    for divisor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:,.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"
