"""What a training reports of its steps."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.model import ModelConfig
from gristmill.model.counts import count_params, train_flops_per_token
from gristmill.streaming.batches import Batches
from gristmill.train.config import TrainConfig


@dataclass(frozen=True)
class Step:
    """Figures over the steps since the last `Step`. `seconds` of training since it started, without saving.

    `step` counts steps, those that were left out too; `tokens` and `source_tokens` are what was trained on.
    """

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
    skipped_steps: int


@dataclass
class Sums:
    """What a step adds up, on the model's device. nll_N: negative log-likelihood by source, in nats."""

    nll_N: Tensor
    balance: Tensor
    counts_LE: Tensor

    @classmethod
    def zero(cls, num_sources: int, cfg: ModelConfig, device: torch.device) -> "Sums":
        shape = (cfg.n_layers, cfg.moe_num_experts if cfg.ffn == "moe" else 1)
        sizes: list[tuple[int, ...]] = [(num_sources,), (), shape]
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, nll_N: Tensor, balance: Tensor, counts_LE: Tensor) -> None:
        self.nll_N += nll_N
        self.balance += balance
        self.counts_LE += counts_LE

    def loss(self, num_tokens: int) -> float:
        return float(self.nll_N.sum()) / num_tokens  # waits for the device


class Figures:
    """Sums since the last logged step, and the totals that are a function of the step and of those left out."""

    def __init__(self, cfg: TrainConfig, model_cfg: ModelConfig, batches: Batches, gemm_flops: float) -> None:
        self.cfg, self.model_cfg, self.batches, self.gemm_flops = cfg, model_cfg, batches, gemm_flops
        self.counts = count_params(model_cfg)
        self.flops_per_token = train_flops_per_token(model_cfg, cfg.seq_len)
        self.seconds = 0.0
        self.clock = time.perf_counter()
        self.last_loss = float("nan")
        self._clear()

    def _clear(self) -> None:
        num_sources = len(self.batches.source_names)
        self._sums: Sums | None = None
        self._sequences = np.zeros(num_sources, np.int64)
        self._steps = 0

    @property
    def empty(self) -> bool:
        """No step counted since the last logged one."""
        return self._sums is None

    def add(self, step: int, sums: Sums) -> None:
        self._sequences += self._of_step(step)
        self._steps += 1
        if self._sums is None:
            self._sums = sums
        else:
            self._sums.add(sums.nll_N, sums.balance, sums.counts_LE)

    def drop(self) -> None:
        """Training went back: what was summed up did not happen."""
        self._clear()

    def since_last(self, done: int, lr: float, grad_norm: float, skipped: list[int]) -> Step:
        assert self._sums is not None
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        self.seconds += elapsed
        tokens = self._steps * self.cfg.batch_tokens
        nll = self._sums.nll_N.tolist()
        load = self._sums.counts_LE / self._sums.counts_LE.sum(1, keepdim=True)
        names, lengths = self.batches.source_names, [int(n) * self.cfg.seq_len for n in self._sequences]
        self.last_loss = sum(nll) / tokens
        figures = Step(
            step=done,
            tokens=self.trained(done, skipped),
            seconds=self.seconds,
            loss=self.last_loss,
            balance_loss=float(self._sums.balance) / self._steps,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=tokens / elapsed,
            mfu=tokens / elapsed * self.flops_per_token / self.gemm_flops,
            expert_load=[[round(share, 4) for share in layer] for layer in load.tolist()],
            load_max_over_mean=float(load.max() * load.shape[1]),
            source_tokens=self._source_tokens(done, skipped),
            source_loss={n: s / c for n, s, c in zip(names, nll, lengths, strict=True) if c},
            curriculum_stage=self.batches.curriculum_stage(done - 1),
            skipped_steps=sum(step < done for step in skipped),
        )
        self._clear()
        return figures

    def summary(self, done: int, skipped: list[int]) -> dict[str, Any]:
        """What a checkpoint's manifest says of it."""
        return {
            "step": done,
            "train_tokens": self.trained(done, skipped),
            "skipped_steps": sum(step < done for step in skipped),
            "total_params": self.counts.total_params,
            "active_params": self.counts.active_params,
            "flops_per_token": self.flops_per_token,
            "final_loss": self.last_loss if math.isfinite(self.last_loss) else None,
        }

    def trained(self, done: int, skipped: list[int]) -> int:
        """Tokens of the steps before `done` that were not left out."""
        return (done - sum(step < done for step in skipped)) * self.cfg.batch_tokens

    def _source_tokens(self, done: int, skipped: list[int]) -> dict[str, int]:
        left_out = sum((self._of_step(step) for step in skipped if step < done), np.zeros_like(self._sequences))
        counts = self.batches.source_counts(done)
        return {name: (counts[name] - int(left_out[i])) * self.cfg.seq_len for i, name in enumerate(counts)}

    def _of_step(self, step: int) -> Any:
        """Sequences of each source in a step's global batch."""
        return np.bincount(self.batches.samples(step)[0], minlength=len(self.batches.source_names))
