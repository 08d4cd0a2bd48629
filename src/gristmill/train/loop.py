"""The training loop, a generator. To do more around it, write a `for` loop over its events.

for event in train(job, stop, ranks):
    match event:
        case Started(): ...     # once, new or resumed
        case Step(): ...        # the figures since the last one
        case Skipped(): ...     # a step that was not sane was left out
        case Reached(): ...     # at a checkpoint's step, also the one gone on from: look at the model, change nothing
        case Saved(): ...       # a checkpoint is on disk, some time later
        case SaveFailed(): ...  # or it is not; the older ones stand
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gristmill.artifact import Artifact, load
from gristmill.background import Answer
from gristmill.errors import Failure, InputError
from gristmill.kernels.memory import keep_freed_memory
from gristmill.model import ModelConfig, Transformer
from gristmill.parallel.apply import parallel_model
from gristmill.parallel.config import Layout, lay_out, misfit
from gristmill.parallel.mesh import Mesh, make_mesh
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.stop import Stop, StopRequested
from gristmill.streaming.batches import Batch, Batches
from gristmill.streaming.config import Remote
from gristmill.streaming.order import Stage
from gristmill.train.balance import Balance
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
from gristmill.train.config import CheckpointConfig, TrainConfig
from gristmill.train.figures import Figures, Step
from gristmill.train.gradients import Gradients
from gristmill.train.guard import Guard
from gristmill.train.machine import apply_compute, choose_compute
from gristmill.train.neighbors import Neighbors
from gristmill.train.optimizer import Optimizer
from gristmill.train.remote import fetch_latest
from gristmill.train.schedule import learning_rate_scale

__all__ = ["Reached", "SaveFailed", "Saved", "Skipped", "Started", "Step", "TrainingJob", "layout_of", "train"]


@dataclass(frozen=True)
class Started:
    """`step`: 0, or where training goes on. `damage`: newer checkpoints that could not be used, and why."""

    step: int
    model: Transformer
    compute: dict[str, Any]
    gemm_flops: float
    data_sheet_flops: float | None
    damage: list[str]


@dataclass(frozen=True)
class Skipped:
    """A step (from 0) was left out. `back_to`: the step that training went back to, or None."""

    step: int
    reason: str
    back_to: int | None


@dataclass(frozen=True)
class Reached:
    """`tokens`: trained on so far. `again`: training goes on from here; the process before may have looked, or not."""

    step: int
    tokens: int
    model: Transformer
    again: bool = False


Event = Started | Step | Skipped | Reached | Saved | SaveFailed


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training: its configuration, its inputs, and the folder that it writes to.

    Args:
        layout: How the ranks share the work, from `layout_of`.
        shards: A directory with one MDS directory per source.
        remote: Where the shard files are stored, if `shards` holds only their indexes.
        tokenizer: A folder that is copied into each checkpoint.
        start: A checkpoint that provides the initial weights; None initializes them randomly.
        folder: Checkpoints are saved here. Training resumes from the newest valid one.
        identity: Key, configuration and inputs, recorded in the manifest of each checkpoint.
    """

    cfg: TrainConfig
    model_cfg: ModelConfig
    layout: Layout
    shards: Path
    remote: Remote | None = None
    tokenizer: Path
    start: Path | None = None
    folder: Path
    curriculum: Sequence[Stage]
    identity: Identity


def train(job: TrainingJob, stop: Stop, ranks: Ranks = ALONE) -> Generator[Event]:
    """Train up to `job.cfg.steps` and save checkpoints in `job.folder`; resume from the newest valid one there.

    When `stop` is set on any rank, the step under way is dropped (of several ranks: finished), what was done is saved,
    and the generator ends. Closing it waits for a save under way.
    Raises Failure when training diverges, a checkpoint cannot be saved, or a rank has gone.
    """
    cfg, model_cfg, layout, folder, identity = job.cfg, job.model_cfg, job.layout, job.folder, job.identity
    keep_freed_memory()
    sizes = (cfg.seq_len, cfg.sequences_per_batch, cfg.steps)
    opening = partial(Batches, job.shards, *sizes, job.curriculum, cfg.seed, job.remote)
    batches = Answer(opening).get(stop)  # None: a slow network, and nothing to save yet
    if ranks.any(batches is None) or batches is None:
        return
    resumed, damage = newest(folder, identity.key, cfg.checkpoint, ranks)
    compute = choose_compute(cfg, layout, read_state(resumed.path).compute if resumed else None)
    compute = apply_compute(ranks.scatter([compute] * ranks.world_size if ranks.rank == 0 else None))
    mesh = make_mesh(layout, compute["device"], cfg.rank_timeout_s) if layout.split > 1 else None
    model = begin(cfg, model_cfg, compute, mesh, None if resumed else job.start)
    optimizer = Optimizer(cfg.optimizer, model, ranks, layout.replicate)
    guard, balance = Guard(cfg.guard), Balance(cfg, model, ranks)
    gradients = Gradients(model, cfg, balance, len(batches.source_names), folder, ranks, mesh, stop)
    done = saved = go_on(resumed, model, optimizer, guard) if resumed else 0
    saving = Checkpoints(folder, cfg.checkpoint, identity, model_cfg, job.tokenizer, job.start, ranks)
    threads = compute["threads"] if compute["device"] == "cpu" else 1
    with closing(saving) as checkpoints, closing(Neighbors(threads)) as neighbors:
        figures = Figures(cfg, model_cfg, batches, model.compute_dtype, ranks.world_size)
        yield Started(done, model, compute, figures.gemm_flops, figures.data_sheet_flops, damage)
        if done and due(cfg, done):
            yield Reached(done, figures.trained(done, guard.skipped), model, again=True)

        def save() -> None:
            if ranks.any(not optimizer.is_finite()):
                raise Failure(f"weights are not finite at step {done}: training diverged; lower train.optimizer.lr")
            state = State(done, compute, guard.state())
            checkpoints.save(state, model.state_dict(), optimizer.state(), figures.summary(done, guard.skipped))

        def upcoming() -> Generator[Batch]:
            steps = (step for step in range(done, cfg.steps) if step not in guard.skipped)
            return batches.ahead(steps, cfg.workers, ranks.rank // layout.context, layout.data, stop)

        waiting = upcoming()
        figures.restart_clock()
        lr = grad_norm = 0.0
        while done < cfg.steps:
            if done not in guard.skipped:
                torch.manual_seed(jitter_seed(cfg.seed, done, ranks.rank))
                try:
                    sums = gradients.of(next(waiting, None))
                except StopRequested:
                    break
                norm = optimizer.clip()
                if reason := guard.judge(sums.loss(cfg.batch_tokens), norm):
                    optimizer.drop()
                    guard.skip(done)
                    if cfg.guard.policy != "skip":
                        yield from settled(checkpoints.wait(), cfg.checkpoint)
                    if cfg.guard.policy == "stop" or guard.too_many(done):
                        raise Failure(diverged(cfg, done, reason))
                    rolls = cfg.guard.policy == "roll_back"
                    back = newest(folder, identity.key, cfg.checkpoint, ranks)[0] if rolls else None
                    yield Skipped(done, reason, read_state(back.path).step if back else None)
                    if back:
                        waiting.close()
                        done = saved = go_on(back, model, optimizer, guard)
                        waiting = upcoming()
                        figures.drop()
                        continue
                else:
                    lr, grad_norm = cfg.optimizer.lr * learning_rate_scale(cfg.schedule, done, cfg.steps), norm
                    with ranks.meeting():
                        optimizer.step(lr)
                    balance.after(sums.counts_LE)
                    figures.add(done, sums)
            done += 1
            neighbors.look()
            if (due(cfg, done) or done % cfg.log_every == 0) and not figures.empty:
                yield figures.since_last(done, lr, grad_norm, guard.skipped)
            if due(cfg, done):
                save()  # first: whoever looks may take long, and then a fault costs the looking alone
                saved = done
                yield Reached(done, figures.trained(done, guard.skipped), model)
                figures.restart_clock()  # saving and whatever the caller did are not training time
            yield from settled(checkpoints.finished(), cfg.checkpoint, last=done == cfg.steps)
        if not figures.empty:
            yield figures.since_last(done, lr, grad_norm, guard.skipped)
        yield from settled(checkpoints.wait(), cfg.checkpoint, last=done == cfg.steps)
        if ranks.from_first(done > saved or checkpoints.failed):  # stopped between two, or without the last one
            save()
        yield from settled(checkpoints.wait(), cfg.checkpoint, last=True)


def jitter_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the router's jitter: different on each rank and in each step, and the same after a resume.

    The CPU's generator uses the low 32 bits of a seed. Multiples of 2**32 over the golden ratio keep the ranks far
    apart there: 4,000 ranks share no seed within 700,000 steps.
    """
    return (seed + step + rank * 0x9E3779B9) % 2**32


def due(cfg: TrainConfig, done: int) -> bool:
    """Whether a checkpoint is saved after so many steps."""
    return done % cfg.checkpoint.every == 0 or done == cfg.steps


def layout_of(cfg: TrainConfig, model_cfg: ModelConfig, ranks: Ranks) -> Layout:
    """How the ranks share the work. Raises InputError when they cannot share it evenly."""
    try:
        layout = lay_out(cfg.parallel, ranks.world_size)
    except ValueError as wrong:
        raise InputError(f"train.parallel: {wrong}") from None
    if problem := misfit(model_cfg, layout):
        raise InputError(f"train.parallel: {problem}")
    if cfg.sequences_per_batch % layout.data:
        raise InputError(
            f"train.batch_tokens={cfg.batch_tokens} is {cfg.sequences_per_batch} sequences of {cfg.seq_len}, which "
            f"{layout.data} processes cannot share evenly; start a number that divides it, or change batch_tokens"
        )
    return layout


def begin(
    cfg: TrainConfig, model_cfg: ModelConfig, compute: dict[str, Any], mesh: Mesh | None, start: Path | None
) -> Transformer:
    """A model with the weights of `start`, or random ones."""
    torch.manual_seed(cfg.seed)
    # Random numbers come from the CPU, the same for one GPU as for none; many ranks make theirs where they are needed.
    device = compute["device"] if mesh else "cpu"
    dtype = getattr(torch, compute["dtype"])
    model = parallel_model(model_cfg, dtype, device, mesh, cfg.recompute, compute["compile"]).to(compute["device"])
    if start:
        load_tensors(start, model.state_dict(), {})
    return model


def newest(folder: Path, key: str, cfg: CheckpointConfig, ranks: Ranks) -> tuple[Artifact | None, list[str]]:
    """The checkpoint to go on from, found by rank 0 for all, and what is wrong with newer ones, which are removed."""
    found: Artifact | None = None
    damage: list[str] = []
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
            discard_unusable(folder, read_state(found.path).step if found else 0)
    step = ranks.from_first(read_state(found.path).step if found else 0)
    return (found or load(checkpoint_path(folder, step)) if step else None), damage


def go_on(found: Artifact, model: Transformer, optimizer: Optimizer, guard: Guard) -> int:
    """Everything as it was when the checkpoint was saved; returns its step."""
    state = read_state(found.path)
    load_tensors(found.path, model.state_dict(), optimizer.state())
    guard.load(state.guard)
    return state.step


def settled(events: Sequence[Saved | SaveFailed], cfg: CheckpointConfig, last: bool = False) -> Iterator[Event]:
    """Pass on what became of saving; raises Failure where training must not go on without it."""
    for event in events:
        yield event
        if isinstance(event, SaveFailed) and not event.stands and (last or cfg.on_error == "stop"):
            raise Failure(
                f"the checkpoint of step {event.step} was not saved: {event.reason}; older ones stand: make room, or "
                "make the folder writable, then run the same command"
            )


def diverged(cfg: TrainConfig, step: int, reason: str) -> str:
    count = f"{cfg.guard.in_a_row} steps in a row were left out, " if cfg.guard.policy != "stop" else ""
    return (
        f"{count}at step {step} {reason}: training diverged; lower train.optimizer.lr (now {cfg.optimizer.lr}); "
        "checkpoints before it stand"
    )
