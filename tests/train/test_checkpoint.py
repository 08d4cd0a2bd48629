"""Checkpoints: what is loaded is what was saved, whatever happened in between, on however many ranks."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import SERVER
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from gristmill import artifact
from gristmill.current import LATEST
from gristmill.errors import InputError
from gristmill.model import ModelConfig
from gristmill.parallel.ranks import Ranks
from gristmill.train import checkpoint as module
from gristmill.train.checkpoint import (
    Checkpoints,
    Identity,
    Saved,
    SaveFailed,
    State,
    checkpoint_path,
    discard_unusable,
    latest_checkpoint,
    load_tensors,
    read_state,
)
from gristmill.train.config import CheckpointConfig

Tensors = dict[str, Tensor]
KEY = "0123456789abcdef" * 4
MESSAGE = Path("ran")  # what the forged pickle would leave


def in_folder(folder: Path, cfg: CheckpointConfig | None = None, ranks: Ranks | None = None) -> Checkpoints:
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    cfg, ranks = cfg or CheckpointConfig(keep=9), ranks or Ranks()
    return Checkpoints(folder, cfg, Identity(KEY, {}, {}), ModelConfig(), tokenizer, None, ranks)


def tensors_of(step: int) -> tuple[Tensors, Tensors]:
    """A model and its optimizer: many shapes, no values, one value, every dtype that is stored."""
    chance = torch.Generator().manual_seed(step)
    model = {f"blocks.{i}.weight": torch.randn(3 + i, 5, generator=chance) for i in range(4)}
    model |= {"scale": torch.randn((), generator=chance), "none": torch.empty(0, 3)}
    model |= {"half": torch.randn(7, generator=chance).bfloat16(), "wide": torch.randn(2, 3, generator=chance).double()}
    model["turned"] = torch.randn(4, 6, generator=chance).T
    return model, {f"exp_avg/{name}": tensor.float() * 2 for name, tensor in model.items()}


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(State(step, {"device": "cpu"}, {"losses": [0.1 * step]}), *tensors_of(step), {"step": step})


def saved(checkpoints: Checkpoints, *steps: int) -> list[Saved | SaveFailed]:
    events = []
    for step in steps:
        save(checkpoints, step)
        events += checkpoints.wait()
    return events


def zeros(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def load(path: Path) -> tuple[Tensors, Tensors]:
    model, optimizer = map(zeros, tensors_of(0))
    load_tensors(path, model, optimizer)
    return model, optimizer


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted
    )


def is_of(path: Path, step: int) -> bool:
    return all(map(same, load(path), tensors_of(step))) and read_state(path).step == step


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


# ---- one process ---------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved_and_the_safetensors_package_reads_the_same(tmp_path: Path) -> None:
    (event,) = saved(in_folder(tmp_path), 3)
    assert isinstance(event, Saved)
    assert 0 < event.stalled_s <= event.seconds
    path = checkpoint_path(tmp_path, 3)
    assert is_of(path, 3)
    for name, tensors in zip(("model", "optimizer"), tensors_of(3), strict=True):
        assert same(load_file(path / f"{name}.safetensors"), tensors)
    assert artifact.verify(path).problems == artifact.verify(path).not_covered == []
    assert (tmp_path / LATEST).read_text() == "step-00000003\n"


@given(st.recursive(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(), st.lists))
def test_what_the_guard_keeps_comes_back_to_the_last_bit(kept: Any) -> None:
    text = artifact.canonical({"step": 1, "compute": {}, "guard": {"kept": kept}})
    assert repr(State(**json.loads(text)).guard["kept"]) == repr(kept)


class Gate:
    """Holds the thread before it writes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.write = threading.Event(), module.write_verified
        patch.setattr(module, "write_verified", self)

    def __call__(self, file: Path, tensors: Tensors) -> dict[str, Any]:
        assert self.opened.wait(60)
        return self.write(file, tensors)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, checkpoints = Gate(monkeypatch), in_folder(tmp_path)
    model, optimizer = tensors_of(1)
    guard: dict[str, Any] = {"losses": [1.0]}
    metrics: dict[str, Any] = {"source": {"a": 1}}
    checkpoints.save(State(1, {}, guard), model, optimizer, metrics)
    for tensor in (*model.values(), *optimizer.values()):
        tensor.add_(1)
    guard["losses"].append(2.0)
    metrics["source"]["a"] = 2
    assert checkpoints.finished() == []
    gate.opened.set()
    (event,) = checkpoints.wait()
    assert is_of(checkpoint_path(tmp_path, 1), 1)
    assert read_state(checkpoint_path(tmp_path, 1)).guard == {"losses": [1.0]}
    assert isinstance(event, Saved)
    assert event.artifact.metrics == {"source": {"a": 1}}


def test_saves_never_overlap_and_closing_abandons_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, log = module.write_verified, []

    def watched(file: Path, tensors: Tensors) -> dict[str, Any]:
        log.append(f"begin {file.parent.name}")
        entry = write(file, tensors)
        log.append(f"end {file.parent.name}")
        return entry

    monkeypatch.setattr(module, "write_verified", watched)
    checkpoints = in_folder(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.close()
    assert [event.step for event in checkpoints.finished()] == [1, 2, 3]
    assert log == [f"{what} step-0000000{step}" for step in (1, 2, 3) for _ in range(2) for what in ("begin", "end")]


def test_the_same_training_gives_the_same_bytes(tmp_path: Path) -> None:
    events = [saved(in_folder(tmp_path / name), 5)[0] for name in "ab"]
    assert len({event.artifact.content for event in events if isinstance(event, Saved)}) == 1


def test_what_the_disk_changes_is_found_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = in_folder(tmp_path)
    saved(checkpoints, 1)
    told = []

    def flip(descriptor: int, *_: int) -> None:
        told.append(descriptor)
        os.pwrite(os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY), b"\xff", 300)

    monkeypatch.setattr(os, "posix_fadvise", flip)
    (event,) = saved(checkpoints, 2)
    assert isinstance(event, SaveFailed)
    assert "step-00000002/model.safetensors reads back other than it was written" in event.reason
    assert steps_in(tmp_path) == [1]
    assert len(told) == 1
    monkeypatch.undo()
    assert isinstance(saved(checkpoints, 3)[0], Saved)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "free some room"), (errno.EROFS, "make it writable"), (errno.EIO, "could not be written: Input")],
)
def test_a_disk_that_refuses_is_reported_and_older_checkpoints_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    checkpoints = in_folder(tmp_path, CheckpointConfig(keep=1))
    saved(checkpoints, 1)
    before = artifact.load(checkpoint_path(tmp_path, 1)).content
    for moment in range(1, 30):
        calls = iter(range(moment))

        def refuse(_: int, calls: Iterator[int] = calls) -> None:
            if next(calls, None) is None:
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        (*_, event) = saved(checkpoints, 1 + moment)
        monkeypatch.undo()
        if isinstance(event, Saved):
            break
        assert says in event.reason
        found, damage = latest_checkpoint(tmp_path, KEY)
        assert damage == []
        assert found is not None
        if event.stands:  # it failed after the commit
            assert is_of(found.path, 1 + moment)
        else:
            assert found.content == before
            assert steps_in(tmp_path) == [1]
        discard_unusable(tmp_path, 1)
    assert moment > 8  # two files of tensors, the small ones, folders, manifest, latest
    assert isinstance(event, Saved)


FULL_DISK = """
import os, sys, torch
from pathlib import Path
sys.path[:0] = [{here!r}, {above!r}]
from test_checkpoint import in_folder, is_of, saved, checkpoint_path, Saved, latest_checkpoint, KEY
folder = Path("/mnt/training")
checkpoints = in_folder(folder)
assert isinstance(saved(checkpoints, 1)[0], Saved)
room = os.statvfs("/mnt").f_bavail * os.statvfs("/mnt").f_frsize
Path("/mnt/other").write_bytes(b"x" * (room - 8192))
(full,) = saved(checkpoints, 2)
assert "No space left on device; free some room" in full.reason, full
assert not checkpoint_path(folder, 2).exists()
Path("/mnt/other").unlink()
assert isinstance(saved(checkpoints, 3)[0], Saved)
os.system("mount -o remount,ro /mnt")
(fixed,) = saved(checkpoints, 4)
assert "Read-only file system; make it writable" in fixed.reason, fixed
assert is_of(latest_checkpoint(folder, KEY)[0].path, 3)
"""


def small_disk_available() -> bool:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not small_disk_available(), reason="not run: no user namespaces for a small tmpfs here")
def test_a_real_full_disk_and_a_real_read_only_one_leave_the_older_checkpoints(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK.format(here=str(Path(__file__).parent), above=str(Path(__file__).parents[1])))
    command = f"mount -t tmpfs -o size=200k none /mnt && {sys.executable} {script}"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def test_a_mistake_of_ours_is_raised_and_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = in_folder(tmp_path)
    monkeypatch.setattr(module, "write_verified", lambda file, tensors: {}["absent"])
    save(checkpoints, 1)
    with pytest.raises(KeyError, match="absent"):
        checkpoints.wait()
    monkeypatch.undo()
    assert [type(event) for event in saved(checkpoints, 2)] == [Saved]


# ---- damage --------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


DAMAGES: list[Callable[[Path], None]] = [flip, lambda file: os.truncate(file, file.stat().st_size - 1), Path.unlink]


def assert_every_damage_is_named(folder: Path, newest: Path, older: int) -> None:
    """Also that of a file of another rank."""
    for name in artifact.load(newest).manifest["files"]:
        file = newest / name
        good = file.read_bytes()
        for damage in DAMAGES:
            damage(file)
            found, said = latest_checkpoint(folder, KEY)
            assert found is not None
            assert is_of(found.path, older)
            assert [str(file) in line for line in said] == [True]
            file.write_bytes(good)
    found, said = latest_checkpoint(folder, KEY)
    assert found is not None
    assert (found.path, said) == (newest, [])


def test_every_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    saved(in_folder(tmp_path), 1, 2)
    assert_every_damage_is_named(tmp_path, newest := checkpoint_path(tmp_path, 2), older=1)
    flip(newest / artifact.MANIFEST)
    found, said = latest_checkpoint(tmp_path, KEY)
    assert found is not None
    assert (found.path.name, len(said)) == ("step-00000001", 1)
    discard_unusable(tmp_path, 1)
    assert steps_in(tmp_path) == [1]
    assert (tmp_path / LATEST).read_text() == "step-00000001\n"


class Forged:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (MESSAGE,)


def test_a_pickle_beside_the_tensors_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(in_folder(tmp_path), 1)
    path = checkpoint_path(tmp_path, 1)
    forged = pickle.dumps(Forged())
    pickle.loads(forged)
    MESSAGE.unlink()  # it works
    (path / ".metadata").write_bytes(forged)
    found, damage = latest_checkpoint(tmp_path, KEY)
    assert found is not None
    assert is_of(found.path, 1)
    assert damage == []
    assert not MESSAGE.exists()


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    saved(in_folder(tmp_path), 1)
    model, optimizer = map(zeros, tensors_of(1))
    with pytest.raises(InputError, match=r"half has shape \(7,\); the configuration says \(8,\)"):
        load_tensors(checkpoint_path(tmp_path, 1), model | {"half": torch.zeros(8)}, optimizer)
    with pytest.raises(InputError, match="lack 'new'"):
        load_tensors(checkpoint_path(tmp_path, 1), model | {"new": torch.zeros(8)}, optimizer)
    del optimizer["exp_avg/half"]
    with pytest.raises(InputError, match="hold 'exp_avg/half'"):
        load_tensors(checkpoint_path(tmp_path, 1), model, optimizer)


def save_until_killed(folder: Path, first: int, end: Connection) -> None:
    torch.set_num_threads(1)
    checkpoints = in_folder(folder, CheckpointConfig(keep=1))
    for step in range(first, 10**6):
        (event,) = saved(checkpoints, step)
        assert isinstance(event, Saved)
        end.send(step)


@pytest.mark.timeout(300)
def test_a_process_that_is_killed_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    chance, step, half_written = random.Random(0), 0, 0
    for _ in range(8):
        ours, theirs = SERVER.Pipe()
        child = SERVER.Process(target=save_until_killed, args=(tmp_path, step + 1, theirs))
        child.start()
        theirs.close()
        committed = [ours.recv()]
        time.sleep(chance.uniform(0, 0.05))  # the moment is what is tested
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        with suppress(EOFError):
            while True:
                committed.append(ours.recv())
        half_written += any(not (path / artifact.MANIFEST).exists() for path in tmp_path.glob("step-*"))
        found, damage = latest_checkpoint(tmp_path, KEY)
        assert damage == []
        assert found is not None
        step = read_state(found.path).step
        assert step >= committed[-1]
        assert is_of(found.path, step)
        discard_unusable(tmp_path, step)
        assert (tmp_path / LATEST).read_text() == f"{found.path.name}\n"
    assert half_written > 0, "no kill fell inside saving"


# ---- which are kept ------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 60)), st.integers(1, 5), st.none() | st.integers(1, 9))
def test_the_last_ones_are_kept_and_those_at_multiples(steps: set[int], keep: int, every: int | None) -> None:
    kept = CheckpointConfig(keep=keep, keep_every=every).kept(steps)
    for step in steps:
        newer = sum(other > step for other in steps)
        assert (step in kept) == (newer < keep or (every is not None and step % every == 0))
    assert kept <= steps


def test_older_checkpoints_go_after_the_newer_one_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, prune = [], module.prune_checkpoints

    def watched(folder: Path, cfg: CheckpointConfig) -> None:
        there.append([step for step in steps_in(folder) if (checkpoint_path(folder, step) / "manifest.json").exists()])
        prune(folder, cfg)

    monkeypatch.setattr(module, "prune_checkpoints", watched)
    saved(in_folder(tmp_path, CheckpointConfig(keep=1, keep_every=3)), *range(1, 6))
    assert there == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5]]
    assert steps_in(tmp_path) == [3, 5]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"keep": 0}, "keep=0"),
        ({"keep_every": 0}, "keep_every=0 must be at least 1"),
        ({"copy_to": "somewhere"}, "must be a URL"),
        ({"copy_to": "s3://user:secret@bucket/x"}, "must hold no password"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        CheckpointConfig(**given)
    assert "secret" not in str(error.value)
