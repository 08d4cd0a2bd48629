"""What a run holds while it works: the lock on its folder, and the signals that may end it."""

import errno
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
from gristmill.locks import lock
from gristmill.progress import console
from gristmill.stop import Stop


class Stopped(BaseException):
    """The user (SIGINT) or the system (SIGTERM) ended the run; all that was committed stands."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


_DROP = "drops the steps since the last checkpoint"
AGAIN = {  # what a second signal does
    signal.SIGINT: f"; Ctrl-C again {_DROP}",
    signal.SIGTERM: f"; another SIGTERM changes nothing, Ctrl-C (SIGINT) {_DROP}",
}


class Signals:
    """Turn SIGINT and SIGTERM into Stopped. While `graceful`, the first signal only sets `stop`; after it, SIGINT
    raises Stopped and SIGTERM is ignored."""

    def __init__(self) -> None:
        self.stop = Stop()
        self.graceful = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.graceful and self.stop.is_set() and signum == signal.SIGTERM:
            return  # schedulers and launchers send SIGTERM more than once
        if not self.graceful or self.stop.is_set():
            raise Stopped(signum)
        self.stop.set(signum)
        if not console.quiet:
            # Not by the console: what this interrupts may be writing there, and a buffer is not entered twice.
            with suppress(OSError, ValueError):
                received = signal.Signals(signum)
                again = AGAIN.get(received, "")
                said = f"\n  {received.name}: saving what is done, then stopping{again}\n"
                os.write(console.file.fileno(), said.encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second run on one folder. The lock ends with the process, however it ends."""
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out {folder} is or lies below a file; name a folder") from None
    except OSError as problem:
        if problem.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            raise
        raise InputError(f"--out {str(folder)[:80]!r} cannot be a folder: {problem.strerror}; name another") from None
    path = folder / STATE / "lock"
    with path.open("w") as file:
        try:
            lock(file, path)
        except BlockingIOError:
            raise Failure(
                f"{folder} is in use by another gristmill process; wait for it or choose another --out"
            ) from None
        yield
