"""A training goes on, on other numbers of ranks and split in other ways: the same batches, nearly the same figures."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_runs import Run, copied, wait
from torch import Tensor

from gristmill.hub.export import export_model
from gristmill.hub.tensors import open_weights
from gristmill.pipeline import run
from gristmill.stage import Recipe

pytestmark = pytest.mark.timeout(180)
# (processes, how the model is split over them)
WORLDS = [
    (4, ("shard=null", "expert=2")),
    (2, ("shard=2", "expert=2")),
    (1, ()),
    (4, ("shard=2", "expert=2")),
]


@pytest.fixture(scope="module")
def prepared(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_recipe(), tmp_path_factory.mktemp("prepared") / "run", "shards")


def new(recipe: Path, prepared: Path, out: Path, ranks: int, *split: str) -> Run:
    return Run(recipe, copied(prepared, out), overrides(split), ranks)


def overrides(split: tuple[str, ...]) -> tuple[str, ...]:
    """A rank's sequences at once: how a batch is cut into micro-batches, the balancing loss can see."""
    return "train.micro_batch=4", *(f"train.parallel.{size}" for size in split)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-3


def test_four_two_one_and_four_ranks_train_in_turn_as_one(tiny_yaml: Path, prepared: Path, tmp_path: Path) -> None:
    one = new(tiny_yaml, prepared, tmp_path / "one", 1)
    assert one.finish() == [0], one.said()
    turns = new(tiny_yaml, prepared, tmp_path / "turns", 4)
    for ranks, split in WORLDS:
        turns.ranks, turns.overrides = ranks, overrides(split)
        before = max(turns.committed(), default=0)
        processes = turns.start()
        while max(turns.committed(), default=0) <= before and all(p.is_alive() for p in processes):
            time.sleep(0.001)
        assert max(turns.committed(), default=0) > before, turns.said()
        for process in processes:
            process.kill()
        wait(processes)
    assert turns.finish() == [0, 0, 0, 0], turns.said()
    assert turns.committed()[-1] == 8
    for ours, theirs in zip(turns.curve(), one.curve(), strict=True):
        assert ours.get("source_tokens") == theirs.get("source_tokens")
        for figure in {"loss", "balance_loss", "grad_norm"} & theirs.keys():
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3)
    wholes, parts = (open_weights(r.training / "step-00000008") for r in (one, turns))
    for name, weight in wholes.items():
        assert close(parts[name].load(), weight.load()), name
    # What several ranks wrote leaves tensor by tensor; no rank and no exporter ever has the whole model.
    leaves = [open_weights(export_model(r.training / "step-00000008", r.out / "hf").path) for r in (one, turns)]
    assert leaves[0].keys() == leaves[1].keys()
    assert all(close(leaves[0][name].load(), leaves[1][name].load()) for name in leaves[0])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for torchrun's children")
def test_a_killed_rank_is_started_again_by_torchrun_and_nothing_changes(
    tiny_yaml: Path, prepared: Path, tmp_path: Path
) -> None:
    split = ("shard=2", "expert=2")
    unbroken = new(tiny_yaml, prepared, tmp_path / "unbroken", 2, *split)
    assert unbroken.finish() == [0, 0], unbroken.said()
    broken = new(tiny_yaml, prepared, tmp_path / "broken", 2, *split)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command += ["--monitor-interval=0.1", "-m", "gristmill.cli", "train", str(tiny_yaml), "--out", str(broken.out)]
    command += [f"--set={override}" for override in broken.overrides]
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not broken.committed() and torchrun.poll() is None:
            time.sleep(0.01)
        killed = children(torchrun.pid)[1]
        os.kill(killed, signal.SIGKILL)
        assert torchrun.wait(120) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "going on at step" in said
    assert broken.content() == unbroken.content()
    assert broken.curve() == unbroken.curve()
