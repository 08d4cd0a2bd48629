"""What a run holds while it works: the lock on its folder, and the signals that may end it."""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from gristmill.artifact import STATE
from gristmill.errors import Failure, InputError
from gristmill.progress import console


class Stopped(BaseException):
    """The user (SIGINT) or the system (SIGTERM) ended the run; all that was committed stands."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """Turns SIGINT and SIGTERM into Stopped; while `graceful`, the first one only sets `event`, and SIGTERM never does
    more."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.graceful = False
        self.signum = signal.SIGINT
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.graceful and self.event.is_set() and signum == signal.SIGTERM:
            return  # schedulers and launchers send it more than once
        self.signum = signal.Signals(signum)
        if not self.graceful or self.event.is_set():
            raise Stopped(signum)
        self.event.set()
        if not console.quiet:
            # Not by the console: what this interrupts may be writing there, and a buffer is not entered twice.
            with suppress(OSError, ValueError):
                said = f"\n  {self.signum.name}: saving what is done (again to stop at once)\n"
                os.write(console.file.fileno(), said.encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second run on one folder. The lock goes with the process, however it ends."""
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out {folder} is or lies below a file; name a folder") from None
    with (folder / STATE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                f"{folder} is in use by another gristmill process; wait for it or choose another --out"
            ) from None
        yield
