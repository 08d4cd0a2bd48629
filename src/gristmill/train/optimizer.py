"""AdamW and Muon over our parameters, with a state that is saved by name.

Muon orthogonalises the momentum of one matrix, and our parameters hold several: the experts are stacked and q, k and v
are fused. Each is handed on as a view of its own, sharing memory with the parameter and its momentum; the checkpoint
sees whole tensors only. Of a sharded model each rank updates its part; Muon's matrices are made whole for that, each on
one rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gristmill.model import Transformer
from gristmill.parallel.mesh import local
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.parallel.wholes import Wholes
from gristmill.train.config import OptimizerConfig
from gristmill.train.muon import BATCH_NUMEL, muon_update


class Optimizer:
    """Updates all parameters: `clip` the gradients, then `step` or `drop` them. `state()` speaks in names, such as
    "momentum/blocks.0.attn.Wqkv.weight"; whoever fills its tensors has loaded it."""

    def __init__(self, cfg: OptimizerConfig, model: Transformer, ranks: Ranks = ALONE, replicas: int = 1) -> None:
        """ranks, replicas: of a sharded model, all its ranks, and how many of them have the same part."""
        self.cfg, self.ranks, self.replicas = cfg, ranks, replicas
        self.params = dict(model.named_parameters())
        self.matrices = muon_matrices(model) if cfg.name == "muon" else {}
        # What this rank has of each: of a whole parameter it is the parameter itself.
        self.parts = {name: _part(param) for name, param in self.params.items()}
        self.sharded = any(part is not self.params[name] for name, part in self.parts.items())
        others = {name: param for name, param in self.params.items() if name not in self.matrices}
        self.adamw = torch.optim.AdamW(
            [self.parts[name] for name in others],
            lr=cfg.lr,
            betas=(cfg.beta1, cfg.beta2),
            eps=1e-10,
            weight_decay=0.0 if cfg.name == "muon" else cfg.weight_decay,
            fused=True,
        )
        self._state: dict[str, Tensor] = {}
        for name, param in others.items():
            first, second = torch.zeros_like(param), torch.zeros_like(param)
            count = torch.zeros((), device=param.device)
            its = {"exp_avg": local(first), "exp_avg_sq": local(second), "step": count}
            self.adamw.state[self.parts[name]] = its
            self._state |= {f"exp_avg/{name}": first, f"exp_avg_sq/{name}": second, f"count/{name}": count}
        self.momentum = {name: torch.zeros_like(self.params[name]) for name in self.matrices}
        self._state |= {f"momentum/{name}": momentum for name, momentum in self.momentum.items()}
        self.dtype = model.compute_dtype  # of the orthogonalisation: recorded, and the same after a resume

    def clip(self) -> float:
        """Bring the norm of all gradients down to `clip_norm`; returns what it was."""
        if not self.sharded:
            return float(nn.utils.clip_grad_norm_(self.params.values(), self.cfg.clip_norm))
        for name, param in self.params.items():
            self.parts[name].grad = None if param.grad is None else local(param.grad)
        grads = [part.grad for part in self.parts.values() if part.grad is not None]
        squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        self.ranks.sum(squares)
        norm = (squares / self.replicas).sqrt()
        torch._foreach_mul_(grads, (self.cfg.clip_norm / (norm + 1e-6)).clamp(max=1.0).float())
        return float(norm)

    def step(self, lr: float) -> None:
        """Update every parameter at rate `lr` and drop the gradients, which `clip` has seen."""
        for group in self.adamw.param_groups:
            group["lr"] = lr * (self.cfg.embedding_lr_ratio if self.matrices else 1.0)
        self.adamw.step()
        if self.matrices:
            self._muon_step(lr)
        self.drop()

    def is_finite(self) -> bool:
        """Whether all weights that this rank has are numbers."""
        return all(bool(part.isfinite().all()) for part in self.parts.values())

    def drop(self) -> None:
        for param in (*self.params.values(), *self.parts.values()):
            param.grad = None

    @torch.no_grad()
    def _muon_step(self, lr: float) -> None:
        params = [self.parts[name].detach() for name in self.matrices]
        grads = [self._grad(name) for name in self.matrices]
        momenta = [local(momentum) for momentum in self.momentum.values()]
        torch._foreach_lerp_(momenta, grads, 1 - self.cfg.momentum)
        torch._foreach_lerp_(grads, momenta, self.cfg.momentum)  # Nesterov's, in the gradients: they are dropped anyway
        if self.cfg.weight_decay:
            torch._foreach_mul_(params, 1 - lr * self.cfg.weight_decay)
        if self.sharded:
            self._update_by_wholes(dict(zip(self.matrices, grads, strict=True)), lr)
        else:
            rows = list(self.matrices.values())
            muon_update(_views(params, rows), _views(grads, rows), lr, self.dtype)

    def _grad(self, name: str) -> Tensor:
        grad = self.parts[name].grad
        assert grad is not None, f"{name} has no gradient"
        return grad

    def _update_by_wholes(self, grads: dict[str, Tensor], lr: float) -> None:
        """Tensors alike together, but no more than keep the ranks busy: what is whole costs memory."""
        alike: dict[object, list[str]] = {}
        for name in grads:
            param = self.params[name]
            assert isinstance(param, DTensor)
            alike.setdefault((param.shape, param.placements, self.matrices[name]), []).append(name)
        for names in alike.values():
            like, rows = self.params[names[0]], self.matrices[names[0]]
            assert isinstance(like, DTensor)
            # A stack's matrices are dealt one by one; q, k and v, split across their borders, stay together.
            weights = [part for name in names for part in _dealt(self.parts[name].detach(), rows)]
            parts = [part for name in names for part in _dealt(grads[name], rows)]
            at_once = Wholes.at_once(like, parts[0], BATCH_NUMEL[like.device.type])
            for first in range(0, len(parts), at_once):
                some = parts[first : first + at_once]
                exchange = Wholes(like, some[0], len(some))
                wholes = exchange.gathered(some)
                moves = torch.zeros_like(wholes)
                if len(wholes):  # there may be more ranks than matrices
                    each = [rows or (wholes.shape[1],)] * len(wholes)
                    muon_update(_views(moves.unbind(), each), _views(wholes.unbind(), each), lr, self.dtype)
                torch._foreach_add_(weights[first : first + at_once], exchange.returned(moves))

    def state(self) -> dict[str, Tensor]:
        return self._state


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


def _views(tensors: Sequence[Tensor], rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [matrix for tensor, its in zip(tensors, rows, strict=True) for matrix in matrices_of(tensor, its)]


def _dealt(part: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    return [part] if rows else list(part.unbind())


def _part(param: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(local(param.detach())) if isinstance(param, DTensor) else param
