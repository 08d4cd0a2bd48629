"""Signals may come at any moment, and more than once."""

import os
import signal
from pathlib import Path

import pytest

from gristmill.progress import console
from gristmill.session import Signals, Stopped
from gristmill.stop import Stop


def test_a_signal_that_comes_while_the_console_is_written_to_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("w") as log, Signals() as signals:
        monkeypatch.setattr(console, "_file", log)
        signals.graceful = True
        before = signal.signal(signal.SIGALRM, signals._handle)
        try:
            for _ in range(200):
                signals.stop = Stop()
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                while not signals.stop.is_set():
                    console.print("a line " * 200)
        finally:
            signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "log").read_text().count("SIGALRM: saving what is done") == 200


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (signal.SIGTERM, "another SIGTERM changes nothing, Ctrl-C (SIGINT) drops the steps"),
        (signal.SIGINT, "Ctrl-C again drops the steps"),
    ],
)
def test_what_is_said_of_a_second_signal_is_what_it_does(
    first: signal.Signals, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("w") as log, Signals() as signals:
        monkeypatch.setattr(console, "_file", log)
        signals.graceful = True
        os.kill(os.getpid(), first)
        assert signals.stop.signum == first
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)  # changes nothing
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped.value.signum == signal.SIGINT
    said = (tmp_path / "log").read_text()
    assert says in said
    assert said.count("saving what is done") == 1
    assert "at once" not in said
