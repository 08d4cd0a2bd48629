"""SIGTERM while training waits for something: what was done is saved within the time that schedulers give."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from broken_runs import Run, copied, wait
from campaign import write_recipe

from gristmill.errors import Failure
from gristmill.inference.runner import Runner
from gristmill.pipeline import run
from gristmill.recipe import load_recipe
from gristmill.session import Stopped
from gristmill.train import checkpoint
from gristmill.train.storage import write_verified

PATIENCE_S = 30  # between SIGTERM and SIGKILL: Slurm's and Kubernetes' default, and torchrun's
COMPUTE = Runner.run
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def prepared(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small shards."""
    small = load_recipe(str(recipe), ("shards.size_limit=2048",))
    return run(small, tmp_path_factory.mktemp("prepared") / "run", "shards")


@pytest.fixture
def bucket(prepared: Path, tmp_path: Path) -> Path:
    (shards,) = (prepared / "shards").iterdir()
    return copied(shards, tmp_path / "bucket")


def until(moment: Callable[[], bool], processes: list[BaseProcess]) -> None:
    while not moment():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)


def stop(processes: list[BaseProcess], said: Callable[[], str]) -> float:
    """Tell all of them; the seconds until the last has ended."""
    started = time.monotonic()
    for process in processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    assert wait(processes, PATIENCE_S + 10) == [75] * len(processes), said()
    return time.monotonic() - started


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_is_heard_while_a_batch_waits_for_the_network(
    recipe: Path, prepared: Path, bucket: Path, tmp_path: Path, ranks: int
) -> None:
    def new(name: str) -> Run:
        out = tmp_path / name
        shutil.copytree(prepared / "corpus", out / "corpus")
        shutil.copytree(prepared / "tokenizer", out / "tokenizer")
        place = (f"shards.remote=file://{bucket}", f"shards.cache={out}-cache", "shards.cache_bytes=16384")
        return Run(recipe, out, (*place, "train.workers=2"), ranks)

    whole = new("whole")
    assert whole.finish() == [0] * ranks, whole.said()

    broken = new("broken")
    shards = copied(bucket, tmp_path / "copy")
    hidden = [bucket / "notes" / "shard.00000.mds", bucket / "verse" / "shard.00000.mds"]
    for file in hidden:  # which training asks for before its first step
        file.unlink()
        os.mkfifo(file)
    processes = broken.start()
    until(lambda: "training the model" in broken.said(), processes)
    time.sleep(2)
    assert stop(processes, broken.said) < PATIENCE_S
    for file in hidden:
        file.unlink()
        shutil.copy(shards / file.relative_to(bucket), file)

    processes = broken.start()
    until(lambda: broken.last_logged() >= 5, processes)
    for file in bucket.glob("*/*.mds"):  # from now on the store says nothing
        file.unlink()
        os.mkfifo(file)
    seen = -1
    while broken.last_logged() > seen:  # what is in the cache is still trained on
        seen = broken.last_logged()
        time.sleep(2)
    assert seen < 24
    assert stop(processes, broken.said) < PATIENCE_S
    assert broken.committed()[-1] == broken.last_logged() == seen

    shutil.rmtree(bucket)
    shards.rename(bucket)
    assert broken.finish() == [0] * ranks, broken.said()
    assert broken.content() == whole.content()
    assert broken.curve() == whole.curve()


# ---- while the held-out loss is measured ---------------------------------------------------------------


@pytest.mark.parametrize(("every", "step"), [("checkpoint", 2), ("checkpoint", 6), ("3", 3), ("5", 5), ("5", 6)])
def test_a_validation_that_a_stop_ended_is_made_good_before_training_goes_on(
    recipe: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str, step: int
) -> None:
    """Checkpoints after 2, 4 and 6 steps; a stop during validation after another step saves that step, too."""
    settings = ("train.steps=6", "train.checkpoint.every=2", f"evaluate.every={every}", "shards.size_limit=2048")
    ours = load_recipe(str(recipe), settings)
    whole, broken = (Run(recipe, copied(prepared, tmp_path / name)) for name in ("whole", "broken"))
    monkeypatch.setattr("gristmill.inference.scorer.TILE_TOKENS", 128)  # a validation takes several forward passes
    run(ours, whole.out, "train")

    def compute(runner: Runner, *args: Any) -> Any:
        if broken.last_logged() == step and not told:
            told.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return COMPUTE(runner, *args)

    told: list[int] = []
    monkeypatch.setattr(Runner, "run", compute)
    with pytest.raises(Stopped):
        run(ours, broken.out, "train")
    assert broken.committed()[-1] == step
    interval = 2 if every == "checkpoint" else int(every)
    assert broken.validated() == list(range(interval, step, interval))
    run(ours, broken.out, "train")
    assert broken.curve() == whole.curve()
    assert broken.content() == whole.content()
    before = broken.curve()
    run(ours, broken.out, "train")
    assert broken.curve() == before


def test_a_killed_run_has_the_validation_records_of_an_unbroken_one(
    recipe: Path, prepared: Path, tmp_path: Path
) -> None:
    """Checkpoints every 4 steps and validation every 3: each kill comes after a validation that the newest checkpoint
    does not cover, so that the next process repeats it."""
    whole, broken = (
        Run(recipe, copied(prepared, tmp_path / name), ("evaluate.every=3", "shards.size_limit=2048"))
        for name in ("whole", "broken")
    )
    assert whole.finish() == [0], whole.said()
    repeated = 0
    for step in (3, 9, 15, 18):
        processes = broken.start()
        until(lambda: step in broken.validated(), processes)  # noqa: B023
        processes[0].kill()
        wait(processes)
        repeated += broken.committed()[-1:] < [step]
    assert repeated >= 2
    assert broken.finish() == [0], broken.said()
    assert broken.validated() == [3, 6, 9, 12, 15, 18, 21, 24]
    assert broken.curve() == whole.curve()
    assert broken.content() == whole.content()


# ---- Ctrl-C, again and again ---------------------------------------------------------------------------


@pytest.mark.parametrize("times", [2, 3])
def test_a_second_ctrl_c_waits_for_the_save_under_way_and_a_third_does_not(
    recipe: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    ours = load_recipe(str(recipe), ("train.steps=6", "train.checkpoint.every=2", "shards.size_limit=2048"))
    broken = Run(recipe, copied(prepared, tmp_path / "run"))
    ended, left = threading.Event(), threading.Event()

    def write(file: Path, tensors: dict[str, Any]) -> dict[str, Any]:
        if file.parent.name == "step-00000004" and file.name == "model.safetensors":
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            if times == 3:
                ended.wait(20)
                left.set()
                raise Failure("the process has ended")
        return write_verified(file, tensors)

    monkeypatch.setattr(checkpoint, "write_verified", write)
    with pytest.raises(Stopped) as stopped:
        run(ours, broken.out, "train")
    assert stopped.value.signum == signal.SIGINT
    assert broken.committed() == ([2, 4] if times == 2 else [2])
    ended.set()
    assert times == 2 or left.wait(20)
