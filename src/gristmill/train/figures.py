"""The metrics of training: loss, throughput, expert load, and tokens by source."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gristmill.model import ModelConfig
from gristmill.model.counts import count_params, train_flops_per_token
from gristmill.streaming.batches import Batches
from gristmill.train.config import TrainConfig
from gristmill.train.guard import Guard
from gristmill.train.machine import data_sheet_flops, gemm_flops

REMEASURE_S = 10.0  # of training between two measurements of the machine


@dataclass(frozen=True)
class Step:
    """Metrics of the steps since the last `Step`.

    `step` counts completed steps, including skipped ones. `tokens` and `source_tokens` count what was trained on.
    `seconds`: training time of this process so far, without saving and validation.
    `gemm_tflops`: the highest rate of matrix products measured so far, summed over all ranks. `mfu_measured` is
    relative to it, `mfu_data_sheet` to the GPUs' data sheet (None if that is not known).
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
    """The sums of a step, on the model's device. N: sources, L: layers, E: experts.

    nll_N: negative log-likelihood in nats. tokens_N: number of tokens.
    """

    nll_N: Tensor
    tokens_N: Tensor
    balance: Tensor
    counts_LE: Tensor

    @classmethod
    def zero(cls, num_sources: int, cfg: ModelConfig, device: torch.device) -> "Sums":
        shape = (cfg.n_layers, cfg.moe_num_experts if cfg.ffn == "moe" else 1)
        sizes: list[tuple[int, ...]] = [(num_sources,), (num_sources,), (), shape]
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, nll_N: Tensor, tokens_N: Tensor, balance: Tensor, counts_LE: Tensor) -> None:
        self.nll_N += nll_N
        self.tokens_N += tokens_N
        self.balance += balance
        self.counts_LE += counts_LE

    def loss(self, num_tokens: int) -> float:
        return float(self.nll_N.sum()) / num_tokens  # waits for the device


class Figures:
    """The sums since the last logged step, and totals, which depend only on the step and on the skipped steps."""

    def __init__(
        self,
        cfg: TrainConfig,
        model_cfg: ModelConfig,
        batches: Batches,
        guard: Guard,
        dtype: torch.dtype,
        num_ranks: int,
    ) -> None:
        self.cfg, self.model_cfg, self.batches, self.guard = cfg, model_cfg, batches, guard
        self.dtype, self.num_ranks = dtype, num_ranks
        self.gemm_flops = gemm_flops(dtype) * num_ranks
        one = data_sheet_flops(dtype)
        self.data_sheet_flops = one * num_ranks if one else None
        self.measured_at = 0.0  # in `seconds`
        self.counts = count_params(model_cfg)
        self.flops_per_token = train_flops_per_token(model_cfg, cfg.seq_len)
        self.seconds = 0.0
        self.clock = time.perf_counter()
        self.last_loss = float("nan")
        self.lr = self.grad_norm = 0.0  # of the last step
        self.drop()

    def drop(self) -> None:
        """Forget the sums since the last logged step."""
        self._sums: Sums | None = None
        self._steps = 0

    @property
    def empty(self) -> bool:
        """Whether no step was added since the last logged one."""
        return self._sums is None

    def add(self, sums: Sums, lr: float, grad_norm: float) -> None:
        self.lr, self.grad_norm = lr, grad_norm
        self._steps += 1
        if self._sums is None:
            self._sums = sums
        else:
            self._sums.add(sums.nll_N, sums.tokens_N, sums.balance, sums.counts_LE)

    def restart_clock(self) -> None:
        """Call it after anything that is not training.

        Measures the machine's rate again, if that costs about 1% or less. The CPU may have been busy last time, so the
        largest of several measurements is the most accurate.
        """
        if self.seconds - self.measured_at > REMEASURE_S and not torch.cuda.is_available():
            self.gemm_flops = max(self.gemm_flops, gemm_flops(self.dtype, 0.1) * self.num_ranks)
            self.measured_at = self.seconds
        self.clock = time.perf_counter()

    def since_last(self, step: int) -> Step:
        assert self._sums is not None
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        self.seconds += elapsed
        tokens = self._steps * self.cfg.batch_tokens
        nll, counts = self._sums.nll_N.tolist(), self._sums.tokens_N.tolist()
        load = self._sums.counts_LE / self._sums.counts_LE.sum(1, keepdim=True)
        self.last_loss = sum(nll) / tokens
        flops = tokens / elapsed * self.flops_per_token
        figures = Step(
            step=step,
            tokens=self.trained_tokens(step),
            seconds=self.seconds,
            loss=self.last_loss,
            balance_loss=float(self._sums.balance) / self._steps,
            lr=self.lr,
            grad_norm=self.grad_norm,
            tokens_per_second=tokens / elapsed,
            gemm_tflops=self.gemm_flops / 1e12,
            mfu_measured=flops / self.gemm_flops,
            mfu_data_sheet=flops / self.data_sheet_flops if self.data_sheet_flops else None,
            expert_load=[[round(share, 4) for share in layer] for layer in load.tolist()],
            load_max_over_mean=float(load.max() * load.shape[1]),
            source_tokens=self._source_tokens(step),
            source_loss={n: s / c for n, s, c in zip(self.batches.source_names, nll, counts, strict=True) if c},
            curriculum_stage=self.batches.curriculum_stage(step - 1),
            skipped_steps=len(self._skipped(step)),
        )
        self.drop()
        return figures

    def summary(self, step: int) -> dict[str, Any]:
        """The metrics in a checkpoint's manifest."""
        return {
            "step": step,
            "train_tokens": self.trained_tokens(step),
            "skipped_steps": len(self._skipped(step)),
            "total_params": self.counts.total_params,
            "active_params": self.counts.active_params,
            "flops_per_token": self.flops_per_token,
            "final_loss": self.last_loss if math.isfinite(self.last_loss) else None,
        }

    def trained_tokens(self, step: int) -> int:
        """Tokens of the first `step` steps, without the skipped ones."""
        return (step - len(self._skipped(step))) * self.cfg.batch_tokens

    def _skipped(self, step: int) -> list[int]:
        return [skipped for skipped in self.guard.skipped if skipped < step]

    def _source_tokens(self, step: int) -> dict[str, int]:
        counts = self.batches.source_counts(step)
        for skipped in self._skipped(step):
            for source in self.batches.samples(skipped)[0].tolist():
                counts[self.batches.source_names[source]] -= 1
        return {name: count * self.cfg.seq_len for name, count in counts.items()}
