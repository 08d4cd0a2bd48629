"""AdamW, by torch's fused kernel."""

from collections.abc import Collection

import torch
from torch import Tensor

from gristmill.parallel.mesh import local
from gristmill.plan.footprint import FP32, OptimizerCost
from gristmill.train.optim.parameters import Parameters
from gristmill.train.optim.rule import UpdateRule

EPS = 1e-10


class AdamW(UpdateRule):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

    cost = OptimizerCost(name="adamw", bytes_per_parameter=2 * FP32, bytes_per_matrix_parameter=2 * FP32)
    options = ("weight_decay", "beta1", "beta2")

    def __init__(
        self,
        parameters: Parameters,
        names: Collection[str] | None = None,
        *,
        weight_decay: float,
        beta1: float,
        beta2: float,
    ) -> None:
        """names: The parameters to update; None updates all."""
        names = parameters.whole if names is None else names
        parts = [parameters.parts[name] for name in names]
        self.adamw = torch.optim.AdamW(
            parts, lr=0.0, betas=(beta1, beta2), eps=EPS, weight_decay=weight_decay, fused=True
        )
        self._state: dict[str, Tensor] = {}
        for name, part in zip(names, parts, strict=True):
            param = parameters.whole[name]
            first, second = torch.zeros_like(param), torch.zeros_like(param)
            count = torch.zeros((), device=param.device)
            self.adamw.state[part] = {"exp_avg": local(first), "exp_avg_sq": local(second), "step": count}
            self._state |= {f"exp_avg/{name}": first, f"exp_avg_sq/{name}": second, f"count/{name}": count}

    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def state(self) -> dict[str, Tensor]:
        return self._state
