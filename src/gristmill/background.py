"""Calls in threads of their own, which hold nothing up: not a caller who gives up waiting, nor the end of the process
(concurrent.futures joins its threads there)."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from gristmill.stop import Stop

T = TypeVar("T")


class Answer(Generic[T]):
    """What a call that has begun will return. One that is given up answers where nobody looks."""

    def __init__(self, call: Callable[[], T]) -> None:
        # Not a SimpleQueue: in CPython 3.11 a signal handled until after the timeout makes its `get` wait for ever.
        self._place: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        threading.Thread(target=self._work, args=(call,), daemon=True).start()

    def _work(self, call: Callable[[], T]) -> None:
        try:
            self._place.put((call(), None))
        except Exception as problem:
            self._place.put((None, problem))

    def within(self, timeout_s: float) -> tuple[T, Exception | None]:
        """The value, and what the call raised instead; to be had once. Raises queue.Empty when it takes longer."""
        return self._place.get(timeout=timeout_s)

    def get(self, stop: Stop, poll_s: float = 0.1) -> T | None:
        """Return the value or raise what the call raised. None if `stop` is set first.

        It does not raise StopRequested: ranks must agree to stop before one of them leaves.
        """
        while True:
            try:
                value, problem = self.within(poll_s)
            except queue.Empty:
                if stop.is_set():
                    return None
                continue
            if problem is not None:
                raise problem
            return value
