"""The training loop, a generator. To do more around it, write a `for` loop over its events.

for event in train(job, stop, ranks):
    match event:
        case Started(): ...        # once, whether new or resumed
        case Step(): ...           # metrics since the last logged step
        case Skipped(): ...        # the guard rejected a step
        case ValidationDue(): ...  # measure the held-out loss now; do not change the model
        case Saved(): ...          # a checkpoint was written, some steps after its own
        case SaveFailed(): ...     # a checkpoint was not written; older ones remain
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gristmill.background import Answer
from gristmill.errors import Failure, InputError
from gristmill.kernels.memory import keep_freed_memory
from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.parallel.apply import build_model
from gristmill.parallel.config import Layout, lay_out, misfit
from gristmill.parallel.mesh import Mesh, make_mesh, part_of
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.stop import Stop, StopRequested
from gristmill.streaming.batches import Batch, Batches
from gristmill.streaming.config import Remote
from gristmill.streaming.order import MixPhase
from gristmill.train.balance import Balance
from gristmill.train.checkpoint import (
    Checkpoint,
    Checkpoints,
    Identity,
    Saved,
    SaveFailed,
    State,
    checkpoint_to_resume,
    load_tensors,
)
from gristmill.train.config import CheckpointConfig, TrainConfig
from gristmill.train.figures import Figures, Step
from gristmill.train.gradients import Gradients
from gristmill.train.guard import Guard
from gristmill.train.machine import apply_compute, choose_compute
from gristmill.train.neighbors import Neighbors
from gristmill.train.optimizer import Optimizer
from gristmill.train.schedule import learning_rate_scale

__all__ = ["SaveFailed", "Saved", "Skipped", "Started", "Step", "TrainingJob", "ValidationDue", "layout_of", "train"]


@dataclass(frozen=True)
class Started:
    """`step`: 0, or the step that training resumes from. `damage`: what is wrong with newer checkpoints."""

    step: int
    model: Transformer
    compute: dict[str, Any]
    gemm_flops: float
    data_sheet_flops: float | None
    damage: list[str]


@dataclass(frozen=True)
class Skipped:
    """The guard rejected a step (counted from 0). `back_to`: the step that training rolled back to, or None."""

    step: int
    reason: str
    back_to: int | None


@dataclass(frozen=True)
class ValidationDue:
    """`tokens`: trained on so far. `resumed`: training resumes here, and the process before may have validated."""

    step: int
    tokens: int
    model: Transformer
    resumed: bool = False


Event = Started | Step | Skipped | ValidationDue | Saved | SaveFailed


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
        validate_every: Steps between two ValidationDue events; None: one at each checkpoint. The last step has one too.
    """

    cfg: TrainConfig
    model_cfg: ModelConfig
    layout: Layout
    shards: Path
    remote: Remote | None = None
    tokenizer: Path
    start: Path | None = None
    folder: Path
    curriculum: Sequence[MixPhase]
    identity: Identity
    validate_every: int | None = None


def train(job: TrainingJob, stop: Stop, ranks: Ranks = ALONE) -> Generator[Event]:
    """Train up to `job.cfg.steps` and save checkpoints in `job.folder`; resume from the newest valid one there.

    When `stop` is set on any rank, the current step is dropped (with several ranks: finished), the completed steps are
    saved, and the generator ends. Closing the generator waits for a save in progress.

    Raises:
        Failure: Training diverged, a checkpoint could not be saved, or a rank is gone.
    """
    cfg = job.cfg
    keep_freed_memory()
    sizes = (cfg.seq_len, cfg.sequences_per_batch, cfg.steps)
    batches = Answer(partial(Batches, job.shards, *sizes, job.curriculum, cfg.seed, job.remote)).get(stop)
    if ranks.any(batches is None) or batches is None:  # stopped while a slow store was read; there is nothing to save
        return
    checkpoint, damage = checkpoint_to_resume(job.folder, job.identity.key, cfg.checkpoint, ranks)
    state = initial_state(job, batches, checkpoint, stop, ranks)
    guard, figures = state.guard, state.figures
    saving = Checkpoints(job.folder, cfg.checkpoint, job.identity, job.model_cfg, job.tokenizer, job.start, ranks)
    with closing(saving) as checkpoints, closing(state.neighbors):
        yield Started(state.step, state.model, state.compute, figures.gemm_flops, figures.data_sheet_flops, damage)
        validate_every = job.validate_every or cfg.checkpoint.every
        if state.step and is_due(state.step, validate_every, cfg.steps):
            yield ValidationDue(state.step, figures.trained_tokens(state.step), state.model, resumed=True)
        loader = load_batches(state, batches, stop)
        figures.restart_clock()
        while state.step < cfg.steps:
            if state.step not in guard.skipped:  # a resumed training passes the steps that it skipped before
                try:
                    problem = train_step(state, next(loader, None))
                except StopRequested:
                    break
                if problem and (yield from skip_step(state, problem, checkpoints)):
                    loader.close()  # training rolled back
                    loader = load_batches(state, batches, stop)
                    continue
            state.step += 1
            state.neighbors.look()
            saves = is_due(state.step, cfg.checkpoint.every, cfg.steps)
            validates = is_due(state.step, validate_every, cfg.steps)
            if (saves or validates or state.step % cfg.log_every == 0) and not figures.empty:
                yield figures.since_last(state.step)
            if saves:
                save(state, checkpoints)  # before validation: a crash there does not lose the steps
            if validates:
                yield ValidationDue(state.step, figures.trained_tokens(state.step), state.model)
            if saves or validates:
                figures.restart_clock()  # neither is training time
            yield from check_saves(checkpoints.finished(), cfg.checkpoint, last=state.step == cfg.steps)
        if not figures.empty:
            yield figures.since_last(state.step)
        yield from check_saves(checkpoints.wait(), cfg.checkpoint, last=state.step == cfg.steps)
        if ranks.from_first(state.step > state.saved_step or checkpoints.failed):  # stopped, or the last save failed
            save(state, checkpoints)
        yield from check_saves(checkpoints.wait(), cfg.checkpoint, last=True)


@dataclass
class TrainState:
    """Everything that a training step reads or changes.

    Args:
        compute: The settings that decide how sums are rounded, recorded in each checkpoint.
        step: Completed steps, including skipped ones.
        saved_step: The step of the last checkpoint.
    """

    job: TrainingJob
    ranks: Ranks
    compute: dict[str, Any]
    model: Transformer
    optimizer: Optimizer
    guard: Guard
    balance: Balance
    gradients: Gradients
    figures: Figures
    neighbors: Neighbors
    step: int = 0
    saved_step: int = 0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Steps that were skipped after it stay skipped."""
        load_tensors(checkpoint.path, self.model.state_dict(), self.optimizer.state())
        self.guard.load(checkpoint.state.guard)
        self.figures.drop()
        self.step = self.saved_step = checkpoint.state.step


def initial_state(
    job: TrainingJob, batches: Batches, checkpoint: Checkpoint | None, stop: Stop, ranks: Ranks
) -> TrainState:
    """The state at the checkpoint, or at step 0."""
    cfg, layout = job.cfg, job.layout
    compute = choose_compute(cfg, layout, checkpoint.state.compute if checkpoint else None)
    compute = apply_compute(ranks.scatter([compute] * ranks.world_size if ranks.rank == 0 else None))
    mesh = make_mesh(layout, compute["device"], cfg.rank_timeout_s) if layout.split > 1 else None
    model = begin(job, compute, mesh, resumes=checkpoint is not None)
    guard, balance = Guard(cfg.guard), Balance(cfg, model, ranks)
    state = TrainState(
        job=job,
        ranks=ranks,
        compute=compute,
        model=model,
        optimizer=Optimizer(cfg.optimizer, model, ranks, layout.replicate),
        guard=guard,
        balance=balance,
        gradients=Gradients(model, cfg, balance, len(batches.source_names), job.folder, ranks, mesh, stop),
        figures=Figures(cfg, job.model_cfg, batches, guard, model.compute_dtype, ranks.world_size),
        neighbors=Neighbors(compute["threads"] if compute["device"] == "cpu" else 1),
    )
    if checkpoint:
        state.restore(checkpoint)
    return state


def load_batches(state: TrainState, batches: Batches, stop: Stop) -> Generator[Batch]:
    """This rank's part of the batches from `state.step` on, without those of skipped steps."""
    cfg, layout = state.job.cfg, state.job.layout
    steps = (step for step in range(state.step, cfg.steps) if step not in state.guard.skipped)
    return batches.ahead(steps, cfg.workers, state.ranks.rank // layout.context, layout.data, stop)


def train_step(state: TrainState, batch: Batch | None) -> str | None:
    """Update the weights with the gradient of one global batch.

    Args:
        batch: This rank's part; None if a stop ended the wait for it.

    Returns:
        None, or why the guard rejected the step; then the weights have not changed.

    Raises:
        StopRequested: On all ranks, when one of them was asked to stop. The weights have not changed.
    """
    cfg, ranks = state.job.cfg, state.ranks
    torch.manual_seed(jitter_seed(cfg.seed, state.step, ranks.rank))
    sums = state.gradients.of(batch)
    grad_norm = state.optimizer.clip()
    if problem := state.guard.judge(sums.loss(cfg.batch_tokens), grad_norm):
        state.optimizer.drop()
        return problem
    lr = cfg.optimizer.lr * learning_rate_scale(cfg.schedule, state.step, cfg.steps)
    with ranks.meeting():
        state.optimizer.step(lr)
    state.balance.after(sums.counts_LE)
    state.figures.add(sums, lr, grad_norm)
    return None


def skip_step(state: TrainState, problem: str, checkpoints: Checkpoints) -> Generator[Event, None, bool]:
    """Skip the current step, and roll back if the policy says so. Returns whether training rolled back.

    Raises Failure if the policy is to stop, or after too many skipped steps in a row.
    """
    job, cfg, policy = state.job, state.job.cfg, state.job.cfg.guard.policy
    state.guard.skip(state.step)
    if policy != "skip":
        yield from check_saves(checkpoints.wait(), cfg.checkpoint)
    if policy == "stop" or state.guard.too_many(state.step):
        raise Failure(divergence(cfg, state.step, problem))
    target = None
    if policy == "roll_back":
        target, _ = checkpoint_to_resume(job.folder, job.identity.key, cfg.checkpoint, state.ranks)
    yield Skipped(state.step, problem, target.state.step if target else None)
    if target:
        state.restore(target)
    return target is not None


def save(state: TrainState, checkpoints: Checkpoints) -> None:
    """Start to save a checkpoint. Raises Failure if a weight is not finite on any rank."""
    if state.ranks.any(not state.optimizer.is_finite()):
        raise Failure(f"weights are not finite at step {state.step}: training diverged; lower train.optimizer.lr")
    saved = State(state.step, state.compute, state.guard.state())
    checkpoints.save(saved, state.model.state_dict(), state.optimizer.state(), state.figures.summary(state.step))
    state.saved_step = state.step


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every `every` steps, and after the last one, happens after `step` steps."""
    return step % every == 0 or step == steps


def jitter_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the router's jitter, which differs by rank and step and is the same after a resume.

    The CPU's generator uses the low 32 bits of a seed. Multiples of 2**32 over the golden ratio keep the ranks far
    apart there: 4,000 ranks share no seed within 700,000 steps.
    """
    return (seed + step + rank * 0x9E3779B9) % 2**32


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


def begin(job: TrainingJob, compute: dict[str, Any], mesh: Mesh | None, resumes: bool) -> Transformer:
    """Build the model with the weights of `job.start` or random ones; allocate them only if a checkpoint follows."""
    dtype = getattr(torch, compute["dtype"])
    model = build_model(job.model_cfg, dtype, compute["device"], mesh, job.cfg.recompute, compute["compile"])
    if resumes:
        return model
    if job.start:
        load_tensors(job.start, model.state_dict(), {})
        return model
    return init_weights(model, job.cfg.seed, part_of)


def check_saves(events: Sequence[Saved | SaveFailed], cfg: CheckpointConfig, last: bool = False) -> Iterator[Event]:
    """Yield the results of saves. Raises Failure if one failed and training must not continue without it."""
    for event in events:
        yield event
        if isinstance(event, SaveFailed) and not event.stands and (last or cfg.on_error == "stop"):
            raise Failure(
                f"the checkpoint of step {event.step} was not saved: {event.reason}; older ones stand: make room, or "
                "make the folder writable, then run the same command"
            )


def divergence(cfg: TrainConfig, step: int, reason: str) -> str:
    """The error message of a training that diverged."""
    count = f"{cfg.guard.in_a_row} steps in a row were left out, " if cfg.guard.policy != "stop" else ""
    return (
        f"{count}at step {step} {reason}: training diverged; lower train.optimizer.lr (now {cfg.optimizer.lr}); "
        "checkpoints before it stand"
    )
