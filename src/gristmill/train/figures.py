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
from gristmill.train.machine import data_sheet_flops, gemm_flops

REMEASURE_S = 10.0  # of training between two measurements of the machine


@dataclass(frozen=True)
class Step:
    """Figures over the steps since the last `Step`. `seconds` of training since it started, without saving.

    `step` counts steps, those that were left out too; `tokens` and `source_tokens` are what was trained on.
    `gemm_tflops`: the largest rate of matrix products measured so far, of all ranks; `mfu_measured` is the share of it.
    `mfu_data_sheet` is the share of the GPUs' data sheet, None where that is not known.
    """

    step: int
    tokens: int
    seconds: float
    loss: float
    balance_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    gemm_tflops: float
    mfu_measured: float
    mfu_data_sheet: float | None
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

    def __init__(self, cfg: TrainConfig, model_cfg: ModelConfig, batches: Batches, dtype: torch.dtype, num_ranks: int):
        self.cfg, self.model_cfg, self.batches, self.dtype, self.num_ranks = cfg, model_cfg, batches, dtype, num_ranks
        self.gemm_flops = gemm_flops(dtype) * num_ranks
        one = data_sheet_flops(dtype)
        self.data_sheet_flops = one * num_ranks if one else None
        self.measured_at = 0.0  # in `seconds`
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

    def restart_clock(self) -> None:
        """After something that is not training. Measures the machine's rate again, if that costs about 1% or less: on
        a CPU that was busy the last time, the largest of several measurements is nearer to the truth."""
        if self.seconds - self.measured_at > REMEASURE_S and not torch.cuda.is_available():
            self.gemm_flops = max(self.gemm_flops, gemm_flops(self.dtype, 0.1) * self.num_ranks)
            self.measured_at = self.seconds
        self.clock = time.perf_counter()

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
        flops = tokens / elapsed * self.flops_per_token
        figures = Step(
            step=done,
            tokens=self.trained(done, skipped),
            seconds=self.seconds,
            loss=self.last_loss,
            balance_loss=float(self._sums.balance) / self._steps,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=tokens / elapsed,
            gemm_tflops=self.gemm_flops / 1e12,
            mfu_measured=flops / self.gemm_flops,
            mfu_data_sheet=flops / self.data_sheet_flops if self.data_sheet_flops else None,
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
