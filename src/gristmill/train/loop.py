"""The training loop, a generator: whoever wants more around it writes a `for` loop.

for event in train(cfg, model_cfg, shards, tokenizer, start, folder, curriculum, identity, stop):
    match event:
        case Started(): ...   # once, new or resumed
        case Step(): ...      # the figures since the last one
        case Saved(): ...     # a checkpoint is on disk; the model may be looked at, not changed
"""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gristmill.artifact import Artifact
from gristmill.errors import Failure, InputError
from gristmill.hub.tensors import open_weights
from gristmill.kernels import native
from gristmill.kernels.loss import cross_entropy
from gristmill.kernels.memory import keep_freed_memory
from gristmill.model import ModelConfig, Transformer, packed
from gristmill.model.counts import count_params, train_flops_per_token
from gristmill.streaming.batches import Batch, Batches
from gristmill.streaming.order import Stage
from gristmill.train.checkpoint import (
    Identity,
    State,
    discard_unusable,
    latest_checkpoint,
    prune_checkpoints,
    read_optimizer,
    read_state,
    save_checkpoint,
)
from gristmill.train.config import TrainConfig
from gristmill.train.machine import best_dtype, gemm_flops
from gristmill.train.optimizer import Optimizer
from gristmill.train.schedule import learning_rate_scale


@dataclass(frozen=True)
class Started:
    """`step`: 0, or where training goes on. `damage`: newer checkpoints that could not be used, and why."""

    step: int
    model: Transformer
    compute: dict[str, Any]
    gemm_flops: float
    damage: list[str]


@dataclass(frozen=True)
class Step:
    """Figures over the steps since the last `Step`. `seconds` of training since `Started`, without saving."""

    step: int
    tokens: int
    seconds: float
    loss: float
    balance_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    mfu: float
    expert_load: list[list[float]]
    load_max_over_mean: float
    source_tokens: dict[str, int]
    source_loss: dict[str, float]
    curriculum_stage: int


@dataclass(frozen=True)
class Saved:
    step: int
    artifact: Artifact
    model: Transformer


def train(
    cfg: TrainConfig,
    model_cfg: ModelConfig,
    shards: Path,
    tokenizer: Path,
    start: Path | None,
    folder: Path,
    curriculum: Sequence[Stage],
    identity: Identity,
    stop: threading.Event,
) -> Iterator[Started | Step | Saved]:
    """Train up to `cfg.steps`, from the newest good checkpoint in `folder`, saving there.

    start: the model whose weights training begins with; None begins with random ones.

    When `stop` is set, the step under way is finished and saved, and the generator ends.
    """
    keep_freed_memory()
    batches = Batches(shards, cfg.seq_len, cfg.sequences_per_batch, cfg.steps, curriculum, cfg.seed)
    resumed, damage = latest_checkpoint(folder, identity.key)
    first_step = read_state(resumed.path).step if resumed else 0
    discard_unusable(folder, first_step)
    compute = apply_compute(read_state(resumed.path).compute if resumed else choose_compute(cfg))
    torch.manual_seed(cfg.seed)
    dtype = getattr(torch, compute["dtype"])
    model = Transformer(model_cfg, dtype).to(compute["device"])
    if cfg.recompute:
        apply_recompute(model)
    optimizer = Optimizer(cfg.optimizer, model)
    if begin := resumed.path if resumed else start:
        model.load_state_dict({name: weight.load() for name, weight in open_weights(begin).items()})
    if resumed:
        optimizer.load(read_optimizer(resumed.path))
    figures = Figures(cfg, model_cfg, batches, gemm_flops(dtype))
    yield Started(first_step, model, compute, figures.gemm_flops, damage)

    figures.clock = time.perf_counter()
    for step in range(first_step, cfg.steps):
        lr = cfg.optimizer.lr * learning_rate_scale(cfg.schedule, step, cfg.steps)
        torch.manual_seed(cfg.seed + step)  # the router's jitter: random, and the same after a resume
        gradients(model, batches.batch(step), cfg.micro_batch, figures)
        grad_norm = optimizer.step(lr)
        done, stopping = step + 1, stop.is_set()
        saving = done % cfg.checkpoint.every == 0 or done == cfg.steps or stopping
        if saving or done % cfg.log_every == 0:
            yield (figures_now := figures.since_last(done, lr, grad_norm))
            if not math.isfinite(figures_now.loss + grad_norm):  # the weights are spoilt: never save them
                raise Failure(
                    f"the loss is {figures_now.loss} and the gradient's norm {grad_norm} at step {done}: training "
                    f"diverged; lower train.optimizer.lr (now {cfg.optimizer.lr})"
                )
        if saving:
            artifact = save_checkpoint(
                folder,
                State(done, compute),
                model_cfg,
                model.state_dict(),
                optimizer.state(),
                tokenizer,
                start,
                identity,
                figures.summary(done),
            )
            prune_checkpoints(folder, cfg.checkpoint.keep)
            yield Saved(done, artifact, model)
            figures.clock = time.perf_counter()  # saving and whatever the caller did are not training time
        if stopping:
            return


def gradients(model: Transformer, batch: Batch, micro_batch: int, figures: "Figures") -> None:
    """Add the gradient of the mean loss over all of the batch's tokens, a micro-batch at a time."""
    device = model.output_weight.device
    arrays = (batch.tokens, batch.targets, batch.positions, batch.document_ids)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    num_sequences, total_tokens = len(batch.tokens), batch.tokens.size
    for start in range(0, num_sequences, micro_batch):
        rows = slice(start, start + micro_batch)
        tokens, targets, positions, documents = (tensor[rows] for tensor in tensors)
        hidden, routing = model(tokens, positions, packed(documents))
        nll_sum, nll_T = cross_entropy(hidden.flatten(0, 1), model.output_weight, targets.flatten())
        share = tokens.shape[0] / num_sequences
        (nll_sum / total_tokens + routing.balance_loss * share).backward()
        figures.add(
            batch.sources[rows], nll_T.view_as(tokens).sum(1), routing.balance_loss.detach() * share, routing.counts_LE
        )


def choose_compute(cfg: TrainConfig) -> dict[str, Any]:
    """The settings that decide rounding, from the configuration or else from the machine."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": "cuda" if on_gpu else "cpu",
        "dtype": cfg.dtype or str(best_dtype()).removeprefix("torch."),
        "threads": cfg.threads or torch.get_num_threads(),
        "kernels": "gpu" if on_gpu else native.in_use(),
    }


def apply_compute(compute: dict[str, Any]) -> dict[str, Any]:
    """Make this process round as the recorded settings do. Raises InputError where it cannot."""
    if compute["device"] == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this training began on a GPU and there is none now: go on where one is, or begin anew in another --out"
        )
    if compute["device"] == "cpu" and compute["kernels"] not in (possible := native.available()):
        raise InputError(
            f"this training began with {compute['kernels']} kernels, and here are {', '.join(possible)}: go on where "
            "they are (a C++ compiler and a new installation bring the native ones), or begin anew in another --out"
        )
    if compute["device"] == "cpu":
        native.use(compute["kernels"])
    torch.set_num_threads(compute["threads"])
    return compute


def apply_recompute(model: Transformer) -> None:
    """Each block keeps its input alone and is computed again in the backward pass (Chen et al., 2016,
    arXiv:1604.06174); the router's jitter is drawn again from the same state."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Figures:
    """Sums since the last logged step; tensors stay on the device until they are asked for."""

    def __init__(self, cfg: TrainConfig, model_cfg: ModelConfig, batches: Batches, gemm_flops: float) -> None:
        self.cfg, self.batches, self.gemm_flops = cfg, batches, gemm_flops
        self.counts = count_params(model_cfg)
        self.flops_per_token = train_flops_per_token(model_cfg, cfg.seq_len)
        self.seconds = self.clock = 0.0
        self.last_loss = float("nan")
        self._clear()

    def _clear(self) -> None:
        num_sources = len(self.batches.source_names)
        self._nll: list[float | Tensor] = [0.0] * num_sources
        self._sequences = [0] * num_sources
        self._balance: float | Tensor = 0.0
        self._routed: Tensor | None = None

    def add(self, sources: Any, nll_B: Tensor, balance: Tensor, counts_LE: Tensor) -> None:
        for index, source in enumerate(sources.tolist()):
            self._nll[source] = self._nll[source] + nll_B[index].detach()
            self._sequences[source] += 1
        self._balance = self._balance + balance
        self._routed = counts_LE if self._routed is None else self._routed + counts_LE

    def since_last(self, step: int, lr: float, grad_norm: float) -> Step:
        nll = [float(value) for value in self._nll]  # waits for the device
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        self.seconds += elapsed
        tokens = sum(self._sequences) * self.cfg.seq_len
        per_second = tokens / elapsed
        assert self._routed is not None
        load = self._routed.float() / self._routed.sum(1, keepdim=True)
        names, lengths = self.batches.source_names, [n * self.cfg.seq_len for n in self._sequences]
        self.last_loss = sum(nll) / tokens
        figures = Step(
            step=step,
            tokens=step * self.cfg.batch_tokens,
            seconds=self.seconds,
            loss=self.last_loss,
            balance_loss=float(self._balance) * self.cfg.batch_tokens / tokens,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=per_second,
            mfu=per_second * self.flops_per_token / self.gemm_flops,
            expert_load=[[round(share, 4) for share in layer] for layer in load.tolist()],
            load_max_over_mean=float(load.max() * load.shape[1]),
            source_tokens={n: c * self.cfg.seq_len for n, c in self.batches.source_counts(step).items()},
            source_loss={n: s / c for n, s, c in zip(names, nll, lengths, strict=True) if c},
            curriculum_stage=self.batches.curriculum_stage(step - 1),
        )
        self._clear()
        return figures

    def summary(self, step: int) -> dict[str, Any]:
        """What a checkpoint's manifest says of it."""
        return {
            "step": step,
            "train_tokens": step * self.cfg.batch_tokens,
            "total_params": self.counts.total_params,
            "active_params": self.counts.active_params,
            "flops_per_token": self.flops_per_token,
            "final_loss": self.last_loss,
        }
