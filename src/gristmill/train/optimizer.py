"""AdamW and Muon over our parameters, with a state that is saved by name.

Muon orthogonalises the momentum of one matrix, and our parameters hold several: the experts are stacked and q, k and v
are fused. Each is handed on as a view of its own, sharing memory with the parameter and its momentum; the checkpoint
sees whole tensors only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gristmill.model import Transformer
from gristmill.train.config import OptimizerConfig
from gristmill.train.muon import muon_update


class Optimizer:
    """Updates all parameters: `clip` the gradients, then `step` or `drop` them. `state()` and `load()` speak in names:
    "momentum/blocks.0.attn.Wqkv.weight"."""

    def __init__(self, cfg: OptimizerConfig, model: Transformer) -> None:
        self.cfg = cfg
        self.params = dict(model.named_parameters())
        self.matrices = muon_matrices(model) if cfg.name == "muon" else {}
        others = {name: param for name, param in self.params.items() if name not in self.matrices}
        self.adamw = torch.optim.AdamW(
            others.values(),
            lr=cfg.lr,
            betas=(cfg.beta1, cfg.beta2),
            eps=1e-10,
            weight_decay=0.0 if cfg.name == "muon" else cfg.weight_decay,
            fused=True,
        )
        self._state: dict[str, Tensor] = {}
        for name, param in others.items():
            first, second, count = torch.zeros_like(param), torch.zeros_like(param), param.new_zeros(())
            self.adamw.state[param] = {"exp_avg": first, "exp_avg_sq": second, "step": count}
            self._state |= {f"exp_avg/{name}": first, f"exp_avg_sq/{name}": second, f"count/{name}": count}
        self.momentum = {name: torch.zeros_like(self.params[name]) for name in self.matrices}
        self._state |= {f"momentum/{name}": momentum for name, momentum in self.momentum.items()}
        self.dtype = model.compute_dtype  # of the orthogonalisation: recorded, and the same after a resume

    def clip(self) -> float:
        """Bring the norm of all gradients down to `clip_norm`; returns what it was."""
        return float(nn.utils.clip_grad_norm_(self.params.values(), self.cfg.clip_norm))

    def step(self, lr: float) -> None:
        """Update every parameter at rate `lr` and drop the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = lr * (self.cfg.embedding_lr_ratio if self.matrices else 1.0)
        self.adamw.step()
        if self.matrices:
            self._muon_step(lr)
        self.drop()

    def drop(self) -> None:
        for param in self.params.values():
            param.grad = None

    @torch.no_grad()
    def _muon_step(self, lr: float) -> None:
        params = [self.params[name].detach() for name in self.matrices]
        grads = [grad for name in self.matrices if (grad := self.params[name].grad) is not None]
        momenta = list(self.momentum.values())
        torch._foreach_lerp_(momenta, grads, 1 - self.cfg.momentum)
        torch._foreach_lerp_(grads, momenta, self.cfg.momentum)  # Nesterov's, in the gradients: they are dropped anyway
        if self.cfg.weight_decay:
            torch._foreach_mul_(params, 1 - lr * self.cfg.weight_decay)
        muon_update(self._views(params), self._views(grads), lr, self.dtype)

    def _views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tensors, self.matrices.values(), strict=True)
        return [matrix for tensor, rows in pairs for matrix in matrices_of(tensor, rows)]

    def state(self) -> dict[str, Tensor]:
        return self._state

    def load(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self._state.keys():
            raise ValueError("the optimizer's saved state does not belong to this model and optimizer")
        for name, tensor in state.items():
            self._state[name].copy_(tensor)


def muon_matrices(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Hidden matrices -> row counts of the matrices that the tensor holds; () for a stack [E, F, D]."""
    cfg = model.cfg
    kv_width = cfg.kv_n_heads * cfg.head_dim
    split: dict[str, tuple[int, ...]] = {}
    for name, param in model.named_parameters():
        match name.split(".")[-2:]:
            case ["Wqkv", "weight"]:
                split[name] = (cfg.n_heads * cfg.head_dim, kv_width, kv_width)
            case ["out_proj", "weight"] | ["ffn", "w1" | "v1" | "w2"]:
                split[name] = (param.shape[0],)
            case ["experts", _]:
                split[name] = ()
    return split


def matrices_of(tensor: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    return list(tensor.split(rows) if rows else tensor.unbind())
