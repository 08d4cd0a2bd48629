"""kill -9 at random moments, then the same command: the model is the one of an unbroken run, to the last bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from gristmill import artifact

NUM_KILLS = int(os.environ.get("GRISTMILL_KILLS", "4"))
# Children start without tokenizers' and torch's extra threads: two cores are enough for the test and one child.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CXX": "none"}


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gristmill.cli", "run", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def half_written(out: Path) -> set[Path]:
    """Checkpoints whose directory is there and whose manifest is not."""
    return {path for path in out.glob("train/*/step-*") if not (path / artifact.MANIFEST).exists()}


def is_saving(out: Path, left_over: set[Path]) -> bool:
    return bool(half_written(out) - left_over)


def is_past(deadline: float) -> bool:
    return time.monotonic() > deadline


def kill_when(child: subprocess.Popen[bytes], moment: Callable[[], bool]) -> bool:
    """True when the child was killed at that moment, False when it ended before."""
    while child.poll() is None:
        if moment():
            child.send_signal(signal.SIGKILL)
            child.wait()
            return True
        time.sleep(0.0005)
    assert child.returncode == 0
    return False


def contents(out: Path) -> dict[str, str]:
    stages = artifact.load(out).manifest["metrics"]["stages"]
    return {name: artifact.load(out / path).content for name, path in stages.items()}


@pytest.mark.timeout(300 + 20 * NUM_KILLS)
def test_a_run_that_is_killed_again_and_again_ends_like_an_unbroken_one(tiny_yaml: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    started = time.monotonic()
    assert start(tiny_yaml, tmp_path / "unbroken").wait() == 0
    duration = time.monotonic() - started
    expected = contents(tmp_path / "unbroken")

    kills, saving, attempt = 0, 0, 0
    while kills < NUM_KILLS:
        out = tmp_path / f"broken-{attempt}"
        attempt += 1
        while kills < NUM_KILLS:
            inside_saving = kills % 2 == 0
            deadline = time.monotonic() + chance.uniform(0.3, 1.0) * duration
            child = start(tiny_yaml, out)
            killed = kill_when(
                child, partial(is_saving, out, half_written(out)) if inside_saving else partial(is_past, deadline)
            )
            if not killed:
                break  # it finished before the moment came; begin anew
            kills += 1
            saving += inside_saving
        assert start(tiny_yaml, out).wait() == 0
        assert contents(out) == expected
        assert artifact.verify(out).problems == []
    assert saving > 0, "no kill fell inside saving"
