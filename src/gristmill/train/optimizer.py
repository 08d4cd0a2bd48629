"""torch's own AdamW and Muon over our parameters, with a state that is saved by name.

Muon (Jordan et al., 2024) orthogonalises the momentum of one matrix. Our parameters hold several: the experts are
stacked and q, k and v are fused. Each matrix is handed to torch as a view of its own, sharing memory with the
parameter, its gradient and its momentum; the checkpoint sees whole tensors only.
"""

import torch
from torch import Tensor, nn

from gristmill.model import Transformer
from gristmill.train.config import OptimizerConfig


class Optimizer:
    """One step over all parameters. `state()` and `load()` speak in names: "momentum/blocks.0.attn.Wqkv.weight"."""

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
        self.views: list[tuple[Tensor, str, int]] = []  # (matrix, parameter's name, index among its matrices)
        self.muon: torch.optim.Muon | None = None
        if self.matrices:
            self._build_muon()

    def _build_muon(self) -> None:
        momentum: list[Tensor] = []
        for name, split in self.matrices.items():
            whole = self._state[f"momentum/{name}"] = torch.zeros_like(self.params[name])
            momentum += matrices_of(whole, split)
            views = matrices_of(self.params[name].detach(), split)
            self.views += [(view, name, index) for index, view in enumerate(views)]
        self.muon = torch.optim.Muon(
            [view for view, _, _ in self.views],
            lr=self.cfg.lr,
            weight_decay=self.cfg.weight_decay,
            momentum=self.cfg.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        for (view, _, _), buffer in zip(self.views, momentum, strict=True):
            self.muon.state[view] = {"momentum_buffer": buffer}

    def step(self, lr: float) -> float:
        """Clip, update every parameter at rate `lr`, drop the gradients; returns the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.params.values(), self.cfg.clip_norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr * (self.cfg.embedding_lr_ratio if self.muon else 1.0)
        self.adamw.step()
        if self.muon:
            gradients = {name: matrices_of(self.params[name].grad, split) for name, split in self.matrices.items()}
            for view, name, index in self.views:
                view.grad = gradients[name][index]
            for group in self.muon.param_groups:
                group["lr"] = lr
            self.muon.step()
            self.muon.zero_grad()
        for param in self.params.values():
            param.grad = None
        return float(norm)

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


def matrices_of(tensor: Tensor | None, rows: tuple[int, ...]) -> list[Tensor]:
    assert tensor is not None
    return list(tensor.split(rows) if rows else tensor.unbind())
