"""The learning rate as a pure function of the step."""

import math

from gristmill.train.config import ScheduleConfig


def learning_rate_scale(cfg: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the peak rate at `step` (from 0): linear warm-up, then warmup-stable-decay or cosine."""
    warmup = math.ceil(cfg.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    match cfg.name:
        case "wsd":
            left = (steps - step) / max(cfg.decay * steps, 1)
            return cfg.final + (1 - cfg.final) * min(1.0, left)
        case "cosine":
            done = (step - warmup) / max(steps - warmup, 1)
            return cfg.final + (1 - cfg.final) * 0.5 * (1 + math.cos(math.pi * done))
