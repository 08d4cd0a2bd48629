"""Checkpoints: `step-00001200/`, an artifact of safetensors and JSON that holds all that training needs to go on.

    model.safetensors      fp32 masters            model.json   the model's shape
    optimizer.safetensors  the optimizer by name   state.json   step, guard, and the settings that decide rounding
    tokenizer/             so that a checkpoint is usable alone

and, of a training that went on from a published model, that one's papers and generation settings. Of several processes
each writes files of its own (`model-00001-of-00002.safetensors`), and an index names what is where.

The files hold no clock and no path: the same training gives the same bytes. Training waits only while the tensors are
copied; a thread writes them, reads them back from the disk and commits. `latest` beside them names the newest.
"""

import copy
import errno
import json
import queue
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.artifact import (
    MANIFEST,
    Artifact,
    Built,
    canonical,
    commit,
    load,
    prepare,
    remove,
    verify,
    write_atomically,
)
from gristmill.current import LATEST, TOKENIZER, step_folders
from gristmill.errors import Failure
from gristmill.hub.checkpoint import CONFIG
from gristmill.hub.folder import DOCUMENTS, GENERATION
from gristmill.model import ModelConfig
from gristmill.parallel.ranks import Pulse, Ranks
from gristmill.train.config import CheckpointConfig
from gristmill.train.remote import Remote, fetch_latest
from gristmill.train.storage import FilePlan, read_tensors, write_verified

STATE = "state.json"
PARTS_TIMEOUT_S = 600.0  # the other ranks have as much to write as rank 0, which waits for them when it is done
POLL_S = 0.02
FAILED = "failed"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint's manifest says of where it comes from; the same for all checkpoints of one training."""

    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Artifact]


@dataclass(frozen=True)
class State:
    """`compute`: device, dtype, threads, kernels, compile, the ranks' layout. They decide how sums are rounded, and are
    enforced when training goes on.
    `guard`: plain JSON that the loop keeps; floats come back to the last bit, NaN and infinity are refused."""

    step: int
    compute: dict[str, Any]
    guard: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint on disk, from which training can resume."""

    path: Path
    state: State


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk, read back and committed. `seconds` from the call of `save` to the commit, `stalled_s`
    of these in which it kept its caller."""

    step: int
    artifact: Artifact
    seconds: float
    stalled_s: float


@dataclass(frozen=True)
class SaveFailed:
    """The disk was full, read-only or failing; older checkpoints stand. `stands`: so does this one, and only its copy
    elsewhere, or the removal of older ones, failed."""

    step: int
    reason: str
    stands: bool = False


@dataclass
class _Save:
    """What the thread is given. `tensors`: file -> copies, which go when they are written."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: bytes
    metrics: dict[str, Any]
    asked: float
    stalled_s: float = 0.0


class Checkpoints:
    """The checkpoints of one training, in its folder. Every rank has one, and all see the same folder.

    A save costs memory: a copy in CPU memory of what this rank writes, until it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        cfg: CheckpointConfig,
        identity: Identity,
        model_cfg: ModelConfig,
        tokenizer: Path,
        start: Path | None,
        ranks: Ranks,
    ) -> None:
        self.folder, self.cfg, self.identity, self.model_cfg = folder, cfg, identity, model_cfg
        self.tokenizer, self.start, self.ranks = tokenizer, start, ranks
        self.failed = False  # the last save, as far as `finished` has told; known to rank 0
        self._file_plans: list[FilePlan] = []
        self._saving: threading.Event | None = None  # set when the save under way has ended
        self._events: queue.SimpleQueue[Saved | SaveFailed] = queue.SimpleQueue()
        self._bug: BaseException | None = None
        self._remote = Remote(cfg.copy_to, identity.key) if cfg.copy_to and ranks.rank == 0 else None

    def save(
        self, state: State, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], metrics: Mapping[str, Any]
    ) -> None:
        """Copy the tensors and return; the rest happens in a background thread. A save under way is waited for first.

        All ranks call it together.
        """
        asked = time.perf_counter()
        self.close()
        with self.ranks.turn():
            pass  # rank 0's save may have been copied elsewhere, for longer than ranks wait for each other
        groups = {"model": model, "optimizer": optimizer}
        if not self._file_plans:
            self._file_plans = [FilePlan(stem, tensors, self.ranks) for stem, tensors in groups.items()]
        path = checkpoint_path(self.folder, state.step)
        if problem := self._prepare(path):
            self._failed(state.step, problem)
            return
        copies = {plan.file: plan.copies(groups[plan.stem]) for plan in self._file_plans}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        job = _Save(state.step, path, copies, canonical(asdict(state)), copy.deepcopy(dict(metrics)), asked)
        self._saving = threading.Event()
        thread = threading.Thread(target=self._run, args=(job, self._saving), name=f"save-{state.step}", daemon=True)
        job.stalled_s = time.perf_counter() - asked
        thread.start()

    def finished(self) -> list[Saved | SaveFailed]:
        """What ended since it was asked last, on rank 0; never waits. Raises what went wrong in a way that no disk
        explains."""
        if self._bug:
            bug, self._bug = self._bug, None
            raise bug
        events = []
        while not self._events.empty():
            event = self._events.get()
            self.failed = isinstance(event, SaveFailed) and not event.stands
            events.append(event)
        return events

    def wait(self) -> list[Saved | SaveFailed]:
        """The same, after the save under way has ended."""
        self.close()
        return self.finished()

    def close(self) -> None:
        """Wait for the save under way; nothing is abandoned."""
        if self._saving:
            self._saving.wait()  # a join that a signal interrupts takes the thread for ended (Python 3.11)
            self._saving = None

    def _prepare(self, path: Path) -> str | None:
        """Rank 0 makes the empty directory; then all ranks know that it is there, or why not."""
        problem = None
        if self.ranks.rank == 0:
            try:
                prepare(path)
            except (OSError, Failure) as failure:
                problem = _reason(path, failure)
        told = self.ranks.scatter([problem] * self.ranks.world_size if self.ranks.rank == 0 else None)
        assert told is None or isinstance(told, str)
        return told

    def _failed(self, step: int, reason: str, stands: bool = False) -> None:
        if self.ranks.rank == 0:
            self._events.put(SaveFailed(step, reason, stands))

    # ---- in the thread: files and no collective calls, which would mix with those of training ----------

    def _run(self, job: _Save, ended: threading.Event) -> None:
        try:
            if self.ranks.rank > 0:
                self._write_part(job)
            elif artifact := self._write(job):
                self._after(artifact, job.step)
        except BaseException as bug:
            self._bug = bug
        finally:
            ended.set()

    def _write_tensors(self, job: _Save) -> dict[str, Any]:
        return {
            file: write_verified(job.path / file, tensors)
            for file in list(job.tensors)
            if (tensors := job.tensors.pop(file))
        }

    def _write_part(self, job: _Save) -> None:
        """What ranks other than 0 do. A failure is said in the same place, if there is room, so that rank 0 need not
        wait until its time is over."""
        part = _part(job.path, self.ranks.rank)
        try:
            write_atomically(part, canonical(self._write_tensors(job)))
        except (OSError, Failure) as problem:
            with suppress(OSError):
                for plan in self._file_plans:
                    (job.path / plan.file).unlink(missing_ok=True)
                write_atomically(part, canonical({FAILED: _reason(job.path, problem)}))

    def _write(self, job: _Save) -> Artifact | None:
        """What rank 0 does. None when it could not be done."""
        try:
            known = self._write_tensors(job) | self._parts_of_others(job.path)
            for plan in self._file_plans:
                plan.write_index(job.path)
            self._write_small(job)
            artifact = commit(
                job.path,
                kind="checkpoint",
                key=self.identity.key,
                config=self.identity.config,
                inputs=self.identity.inputs,
                built=Built(metrics=job.metrics),
                known=known,
            )
        except (OSError, Failure) as problem:
            with suppress(OSError):
                remove(job.path)
            self._failed(job.step, _reason(job.path, problem))
            return None
        self._events.put(Saved(job.step, artifact, time.perf_counter() - job.asked, job.stalled_s))
        return artifact

    def _parts_of_others(self, path: Path) -> dict[str, Any]:
        """What the other ranks wrote, when all have. Raises Failure when one could not, or is not heard of."""
        found: dict[str, Any] = {}
        missing = set(range(1, self.ranks.world_size))
        deadline, pulse = time.monotonic() + PARTS_TIMEOUT_S, Pulse(self.ranks)
        while missing:
            for rank in [rank for rank in missing if _part(path, rank).exists()]:
                part = json.loads(_part(path, rank).read_bytes())
                if FAILED in part:
                    raise Failure(f"rank {rank}: {part[FAILED]}")
                found |= part
                missing.remove(rank)
                _part(path, rank).unlink()
            if gone := pulse.missed(missing):
                raise Failure(f"rank {', '.join(map(str, gone))} is gone, and what it had to write is missing")
            if missing and time.monotonic() > deadline:
                raise Failure(
                    f"{path} lacks what rank {', '.join(map(str, sorted(missing)))} had to write within "
                    f"{PARTS_TIMEOUT_S:.0f} s; every rank must see the same folder"
                )
            if missing:
                time.sleep(POLL_S)
        return found

    def _write_small(self, job: _Save) -> None:
        path, start = job.path, self.start
        (path / CONFIG).write_bytes(canonical(asdict(self.model_cfg)))
        (path / STATE).write_bytes(job.state)
        shutil.copytree(self.tokenizer, path / TOKENIZER, ignore=shutil.ignore_patterns(MANIFEST))
        if start and (start / DOCUMENTS).is_dir():
            shutil.copytree(start / DOCUMENTS, path / DOCUMENTS)
        if start and (start / GENERATION).is_file():
            shutil.copyfile(start / GENERATION, path / GENERATION)

    def _after(self, artifact: Artifact, step: int) -> None:
        """What follows a commit: nothing that goes wrong here makes the checkpoint less good."""
        try:
            _point_to(artifact.path)
            prune_checkpoints(self.folder, self.cfg)
        except OSError as problem:
            self._failed(step, _reason(self.folder, problem), stands=True)
        if self._remote:
            try:
                self._remote.copy(artifact)
                self._remote.prune(self.cfg)
            except Exception as problem:  # each store's library raises its own
                self._failed(step, f"{self.cfg.copy_to} has no copy of it: {problem}", stands=True)


def _part(path: Path, rank: int) -> Path:
    """Where a rank says what it wrote, until rank 0 has read it."""
    return path / f"part-{rank:05d}.json"


def _reason(path: Path, problem: Exception) -> str:
    if not isinstance(problem, OSError):
        return str(problem)
    fix = ""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "; free some room or keep fewer"
    elif problem.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        fix = "; make it writable"
    return f"{path} could not be written: {problem.strerror or problem}{fix}"


# ---- the folder ----------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_state(checkpoint: Path) -> State:
    return State(**json.loads((checkpoint / STATE).read_text()))


def load_tensors(checkpoint: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Fill the tensors in place, whatever number of ranks wrote them; each rank reads what it holds.

    With an empty `optimizer` a folder with weights alone will do. Raises InputError when names or shapes are others,
    Failure when a file is damaged.
    """
    read_tensors(checkpoint, "model", model)
    if optimizer:
        read_tensors(checkpoint, "optimizer", optimizer)


def checkpoint_to_resume(
    folder: Path, key: str, cfg: CheckpointConfig, ranks: Ranks
) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest valid checkpoint and remove the unusable ones. Rank 0 does it for all ranks.

    Returns:
        The checkpoint, or None if there is none yet; and, on rank 0, what is wrong with newer ones.

    Raises:
        Failure: There are checkpoints, and all of them are damaged.
    """
    step, damage = 0, list[str]()
    with ranks.turn() as mine:
        if mine:
            found, damage = latest_checkpoint(folder, key)
            if found is None and cfg.copy_to:
                found, more = fetch_latest(cfg.copy_to, folder, key)
                damage += more
            if found is None and damage:
                raise Failure(
                    f"no checkpoint in {folder} is whole: {'; '.join(damage)}; put a good copy there, or remove them "
                    "all to begin anew"
                )
            step = step_of(found.path) if found else 0
            discard_unusable(folder, step)
    step = ranks.from_first(step)
    if not step:
        return None, damage
    path = load(checkpoint_path(folder, step)).path  # raises Failure on a rank that does not see the folder
    return Checkpoint(path, read_state(path)), damage


def latest_checkpoint(folder: Path, key: str) -> tuple[Artifact | None, list[str]]:
    """The newest checkpoint under this key whose every byte is right, and what is wrong with newer ones."""
    damage: list[str] = []
    for path in reversed(step_folders(folder)):
        if not _is_committed(path):
            continue  # saving it was interrupted
        try:
            artifact, problems = load(path), verify(path).problems
        except Failure as failure:
            damage.append(str(failure))
            continue
        if problems:
            damage += problems
        elif artifact.key == key:
            return artifact, damage
    return None, damage


def discard_unusable(folder: Path, step: int) -> None:
    """Remove what training cannot go on from: checkpoints beyond `step`, which are damaged, and half-written ones.
    `latest` then names the one at `step`."""
    for path in step_folders(folder):
        if path > checkpoint_path(folder, step) or not _is_committed(path):
            remove(path)
    if (newest := checkpoint_path(folder, step)).exists():
        _point_to(newest)
    else:
        (folder / LATEST).unlink(missing_ok=True)


def prune_checkpoints(folder: Path, cfg: CheckpointConfig) -> None:
    """Remove what the rule does not keep."""
    committed = {step_of(path): path for path in step_folders(folder) if _is_committed(path)}
    for step in sorted(committed.keys() - cfg.kept(committed)):
        remove(committed[step])


def _is_committed(path: Path) -> bool:
    return (path / MANIFEST).exists()


def _point_to(path: Path) -> None:
    write_atomically(path.parent / LATEST, f"{path.name}\n".encode())
