"""The optimizer of a training: clips the gradients and updates the parameters by the method in train/optim."""

import torch
from torch import Tensor, nn

from gristmill.model import Transformer
from gristmill.parallel.mesh import local
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.train.config import OptimizerConfig
from gristmill.train.optim import OPTIMIZERS
from gristmill.train.optim.parameters import Parameters


class Optimizer:
    """Updates all parameters: `clip` the gradients, then `step` or `drop` them."""

    def __init__(self, cfg: OptimizerConfig, model: Transformer, ranks: Ranks = ALONE, replicas: int = 1) -> None:
        """ranks, replicas: All ranks of a split model, and how many of them store the same part."""
        self.cfg, self.ranks, self.replicas = cfg, ranks, replicas
        self.parameters = Parameters(model)
        rule = OPTIMIZERS[cfg.name]
        self.rule = rule(self.parameters, **{name: getattr(cfg, name) for name in rule.options})

    def clip(self) -> float:
        """Scale all gradients so that their joint norm is at most `clip_norm`; return the norm before."""
        whole, parts = self.parameters.whole, self.parameters.parts
        if not self.parameters.is_split:
            return float(nn.utils.clip_grad_norm_(whole.values(), self.cfg.clip_norm))
        for name, param in whole.items():
            parts[name].grad = None if param.grad is None else local(param.grad)
        grads = [part.grad for part in parts.values() if part.grad is not None]
        squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        self.ranks.sum(squares)
        norm = (squares / self.replicas).sqrt()
        torch._foreach_mul_(grads, (self.cfg.clip_norm / (norm + 1e-6)).clamp(max=1.0).float())
        return float(norm)

    def step(self, lr: float) -> None:
        """Update every parameter at the rate `lr` with the gradients that `clip` has scaled, and drop them."""
        self.rule.step(lr)
        self.drop()

    def drop(self) -> None:
        """Discard the gradients."""
        for param in (*self.parameters.whole.values(), *self.parameters.parts.values()):
            param.grad = None

    def is_finite(self) -> bool:
        """Return whether all weights that this rank stores are finite."""
        return all(bool(part.isfinite().all()) for part in self.parameters.parts.values())

    def state(self) -> dict[str, Tensor]:
        """Return the state by name, such as "momentum/blocks.0.attn.Wqkv.weight". Filling its tensors restores it."""
        return self.rule.state()
