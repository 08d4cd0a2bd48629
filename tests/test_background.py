"""Waiting for a call in a thread of its own."""

import os
import queue
import signal
import threading
import time
from types import FrameType

import pytest

from gristmill.background import Answer


def test_a_signal_whose_handler_outlasts_the_wait_does_not_make_it_endless() -> None:
    """As on a machine so busy that the process got no turn until the time was over."""
    never, handled = threading.Event(), threading.Event()

    def handle(_signum: int, _frame: FrameType | None) -> None:
        time.sleep(0.3)
        handled.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(queue.Empty):
            Answer(lambda: never.wait(10)).within(0.2)
        assert handled.is_set()
    finally:
        never.set()
        signal.signal(signal.SIGTERM, before)
