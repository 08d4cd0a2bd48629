"""Signals may come at any moment."""

import signal
from pathlib import Path

import pytest

from gristmill.progress import console
from gristmill.session import Signals


def test_a_signal_that_comes_while_the_console_is_written_to_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("w") as log, Signals() as signals:
        monkeypatch.setattr(console, "_file", log)
        signals.graceful = True
        before = signal.signal(signal.SIGALRM, signals._handle)
        try:
            for _ in range(200):
                signals.event.clear()
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                while not signals.event.is_set():
                    console.print("a line " * 200)
        finally:
            signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "log").read_text().count("SIGALRM: saving what is done") == 200
