"""The experts of a dropless mixture: each token visits its k experts, none is dropped, none is padded for.

Shapes: T tokens, D model, E experts, K experts a token, F expert hidden, P rows sorted by expert (padded).

After MegaBlocks (Gale et al., 2022, arXiv:2211.15841), which sorts tokens by expert and multiplies blocks. Here
each expert's rows are rounded up to a tile with rows of weight zero, because a GEMM library prepares a kernel for
each shape that it has not met, and routing makes new row counts at every step. The padding adds exact zeros.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.compiled import fused
from gristmill.kernels.precision import upcast


def experts_reference(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
    """The specification: sum over a token's experts of weight * (silu(x w1ᵀ) * (x v1ᵀ)) w2.

    w1, v1, w2: [E, F, D]. Returns [T, D] in x's dtype.
    """
    out_TD = torch.zeros_like(x_TD)
    for expert in range(w1.shape[0]):
        token, k = (ids_TK == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        x = x_TD[token]
        gate, up = x @ w1[expert].to(x.dtype).T, x @ v1[expert].to(x.dtype).T
        y = (F.silu(gate) * up) @ w2[expert].to(x.dtype)
        out_TD = out_TD.index_add(0, token, y * weights_TK[token, k, None].to(x.dtype))
    return out_TD


def experts(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
    """The same function as `experts_reference`: sorted, tiled, one autograd node.

    The weights may be fp32 masters while x is bf16: they are cast once, and their gradients come back in fp32.
    """
    return _Experts.apply(x_TD, weights_TK, ids_TK, w1, v1, w2)


@dataclass(frozen=True)
class Plan:
    """Where each (token, k) assignment goes among the P sorted and padded rows."""

    token_P: Tensor  # the token that a row reads; padding reads token 0
    slot_TK: Tensor  # the row that an assignment fills
    bounds: list[int]  # E + 1 offsets into P

    def rows(self) -> list[tuple[int, slice]]:
        """(expert, its rows) for each expert that got any."""
        pairs = zip(self.bounds, self.bounds[1:], strict=False)
        return [(expert, slice(start, end)) for expert, (start, end) in enumerate(pairs) if end > start]


def tile_rows(num_assignments: int, num_experts: int) -> int:
    """Rows to round up to: large where experts get hundreds of rows, small where a prompt is short."""
    return 128 if num_assignments >= 128 * num_experts else 16


def make_plan(ids_TK: Tensor, num_experts: int) -> Plan:
    T, K = ids_TK.shape
    tile = tile_rows(T * K, num_experts)
    expert_A = ids_TK.flatten()  # A = T*K assignments
    order_A = expert_A.argsort(stable=True)
    counts_E = torch.bincount(expert_A, minlength=num_experts)
    padded_E = (counts_E + tile - 1) // tile * tile
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    slot_A = torch.arange(T * K, device=ids_TK.device) + shift_E[expert_A[order_A]]
    bounds = [0, *padded_E.cumsum(0).tolist()]
    token_P = torch.zeros(bounds[-1], dtype=torch.long, device=ids_TK.device)
    token_P[slot_A] = order_A // K
    slot_TK = torch.empty_like(order_A)
    slot_TK[order_A] = slot_A
    return Plan(token_P, slot_TK.view(T, K), bounds)


@fused
def _glu(h_PG: Tensor, weight_P: Tensor) -> Tensor:
    """h = [gate, up]: weight * silu(gate) * up. The weight scales here so that an expert's output is never stored."""
    gate, up = upcast(h_PG).chunk(2, dim=1)
    return (F.silu(gate) * up * weight_P[:, None]).to(h_PG.dtype)


@fused
def _glu_backward(h_PG: Tensor, weight_P: Tensor, grad_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the recomputed activation [P, F], the gradient of h [P, 2F] and of the weight [P]."""
    gate, up = upcast(h_PG).chunk(2, dim=1)
    grad = upcast(grad_PF)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    weight = weight_P[:, None]
    grad_act = grad * weight
    grad_gate = grad_act * up * (sigmoid + silu * (1 - sigmoid))
    grad_h = torch.cat([grad_gate, grad_act * silu], dim=1).to(h_PG.dtype)
    return (act * weight).to(h_PG.dtype), grad_h, (grad * act).sum(1)


def _sum_slots(rows_PD: Tensor, slot_TK: Tensor) -> Tensor:
    """Each token's K rows, summed. An embedding bag reads each row once and stores nothing in between."""
    return F.embedding_bag(slot_TK, rows_PD, mode="sum")


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weights_TK, ids_TK, w1, v1, w2):  # type: ignore[no-untyped-def]
        E, F_, _D = w1.shape
        plan = make_plan(ids_TK, E)
        gate_up = torch.cat([w1, v1], dim=1).to(x_TD.dtype)  # [E, 2F, D]: one GEMM reads x once
        down = w2.to(x_TD.dtype)
        P = plan.bounds[-1]
        weights = upcast(weights_TK)
        weight_P = weights.new_zeros(P)
        weight_P[plan.slot_TK.flatten()] = weights.flatten()
        x_PD = x_TD.index_select(0, plan.token_P)
        h_PG = x_TD.new_empty(P, 2 * F_)
        for expert, rows in plan.rows():
            torch.mm(x_PD[rows], gate_up[expert].T, out=h_PG[rows])
        act_PF = _glu(h_PG, weight_P)
        y_PD = x_PD  # reuse: the gathered input is not needed any more
        for expert, rows in plan.rows():
            torch.mm(act_PF[rows], down[expert], out=y_PD[rows])
        ctx.save_for_backward(x_TD, h_PG, weight_P, gate_up, down)
        ctx.plan = plan
        return _sum_slots(y_PD, plan.slot_TK)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, h_PG, weight_P, gate_up, down = ctx.saved_tensors
        plan: Plan = ctx.plan
        F_ = down.shape[1]
        dy_PD = grad_TD.index_select(0, plan.token_P)
        da_PF = h_PG.new_empty(len(weight_P), F_)
        for expert, rows in plan.rows():
            torch.mm(dy_PD[rows], down[expert].T, out=da_PF[rows])
        act_PF, dh_PG, dweight_P = _glu_backward(h_PG, weight_P, da_PF)
        x_PD = x_TD.index_select(0, plan.token_P)
        dgate_up, ddown = torch.zeros_like(gate_up), torch.zeros_like(down)
        for expert, rows in plan.rows():
            torch.mm(act_PF[rows].T, dy_PD[rows], out=ddown[expert])
            torch.mm(dh_PG[rows].T, x_PD[rows], out=dgate_up[expert])
        dx_PD = dy_PD  # reuse
        for expert, rows in plan.rows():
            torch.mm(dh_PG[rows], gate_up[expert], out=dx_PD[rows])
        dx_TD = _sum_slots(dx_PD, plan.slot_TK)
        dw1, dv1 = upcast(dgate_up[:, :F_]), upcast(dgate_up[:, F_:])
        return dx_TD, dweight_P[plan.slot_TK], None, dw1, dv1, upcast(ddown)
