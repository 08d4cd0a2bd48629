"""Whether a step may change the weights: its loss and gradient are numbers, and no spike. Pure; knows no torch.

A spike is a value more than so many standard deviations above the mean of the last steps', as OLMo-core's step-skipping
optimizers have it (Ai2, 2024); what was refused does not enter the mean.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from gristmill.train.config import GuardConfig


class Guard:
    """Judges steps, and remembers which were left out. `state()` is plain JSON; a checkpoint keeps it."""

    def __init__(self, cfg: GuardConfig) -> None:
        self.cfg = cfg
        self.skipped: list[int] = []
        self._recent = {name: deque[float](maxlen=cfg.window) for name in ("loss", "grad_norm")}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with these figures must not count, or None; then they enter the mean."""
        figures = {"loss": loss, "grad_norm": grad_norm}
        for name, value in figures.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
            if (limit := self._limit(name)) is not None and value > limit:
                return f"{name} {value:.4g} is a spike: above {limit:.4g}"
        if self.cfg.sigmas is not None:
            for name, value in figures.items():
                self._recent[name].append(value)
        return None

    def _limit(self, name: str) -> float | None:
        recent = self._recent[name]
        if self.cfg.sigmas is None or len(recent) < self.cfg.window:
            return None
        return statistics.fmean(recent) + self.cfg.sigmas * statistics.pstdev(recent)

    def skip(self, step: int) -> None:
        """Leave this step (from 0) out; when training comes by again, too."""
        self.skipped = sorted({*self.skipped, step})

    def too_many(self, step: int) -> bool:
        """Whether so many steps up to this one were left out in a row that going on makes no sense."""
        return set(range(step - self.cfg.in_a_row + 1, step + 1)) <= set(self.skipped)

    def state(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped), **{name: list(recent) for name, recent in self._recent.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's; what was left out since then stays out."""
        self.skipped = sorted({*self.skipped, *state.get("skipped", ())})
        for name, recent in self._recent.items():
            recent.clear()
            recent.extend(state.get(name, ()))
