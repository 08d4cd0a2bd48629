"""The experts of a dropless mixture: each token visits its k experts, none is dropped, none is padded for.

Shapes: T tokens, D model, E experts, K experts a token, F expert hidden, P rows sorted by expert (padded).

After MegaBlocks (Gale et al., 2022, arXiv:2211.15841), which sorts tokens by expert and multiplies blocks. Here
each expert's rows are rounded up to a tile with rows of weight zero, because a GEMM library prepares a kernel for
each shape that it has not met, and routing makes new row counts at every step. The padding adds exact zeros. A block of
rows goes through all of its expert's products before the next begins, so that it stays in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels import native
from gristmill.kernels.gpu import experts as gpu_experts

BLOCK_ROWS = 4096


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


@torch.compiler.disable  # type: ignore[untyped-decorator]  # row counts are new at every call
def experts(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
    """The same function as `experts_reference`: sorted, tiled, one autograd node.

    On CUDA by grouped GEMMs and Triton. The weights may be fp32 masters while x is bf16: they are cast on the way, and
    their gradients come back in fp32.
    """
    if x_TD.is_cuda:
        return gpu_experts.experts(x_TD, weights_TK, ids_TK, w1, v1, w2)
    return _Experts.apply(x_TD, weights_TK, ids_TK, w1, v1, w2)


@dataclass(frozen=True)
class Plan:
    """Where each (token, k) assignment goes among the P sorted and padded rows."""

    token_P: Tensor  # the token that a row reads; padding reads token 0
    slot_TK: Tensor  # the row that an assignment fills
    bounds: list[int]  # E + 1 offsets into P
    tile: int  # what an expert's rows are rounded up to

    def blocks(self) -> Iterator[tuple[int, slice, bool]]:
        """(expert, rows, whether they are its first): each expert's rows in even pieces of at most BLOCK_ROWS."""
        for expert, (first, end) in enumerate(pairwise(self.bounds)):
            tiles, pieces = (end - first) // self.tile, -(-(end - first) // BLOCK_ROWS)
            cuts = [first + tiles * i // pieces * self.tile for i in range(pieces)] + [end]
            for start, stop in pairwise(cuts):
                yield expert, slice(start, stop), start == first


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
    return Plan(token_P, slot_TK.view(T, K), bounds, tile)


def _glu(h_PG: Tensor, weight_P: Tensor, act_PF: Tensor) -> None:
    """act = weight * silu(gate) * up of h = [gate, up]. The weight scales here: an expert's output is never stored."""
    if native.serves(h_PG):
        return torch.ops.gristmill.glu(h_PG, weight_P, act_PF)
    gate, up = h_PG.chunk(2, dim=1)
    torch.mul(F.silu(gate), up, out=act_PF).mul_(weight_P[:, None].to(act_PF.dtype))


def _glu_backward(
    h_PG: Tensor, weight_P: Tensor, grad_PF: Tensor, act_PF: Tensor, dh_PG: Tensor, dweight_P: Tensor
) -> None:
    """Fills the activation again, the gradient of h and that of the weight."""
    if native.serves(h_PG):
        return torch.ops.gristmill.glu_backward(h_PG, weight_P, grad_PF, act_PF, dh_PG, dweight_P)
    (gate, up), (dgate, dup) = h_PG.chunk(2, dim=1), dh_PG.chunk(2, dim=1)
    weight = weight_P[:, None].to(h_PG.dtype)
    silu, dact = F.silu(gate), grad_PF * weight
    torch.mul(silu, up, out=act_PF)
    dweight_P.copy_((grad_PF * act_PF).sum(1, dtype=weight_P.dtype))
    act_PF.mul_(weight)
    torch.mul(dact, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(dact.mul_(up), gate, grad_input=dgate)


def _sum_slots(rows_PD: Tensor, slot_TK: Tensor) -> Tensor:
    """Each token's K rows, summed. An embedding bag reads each row once and stores nothing in between."""
    return F.embedding_bag(slot_TK, rows_PD, mode="sum")


class _Experts(torch.autograd.Function):
    """Saves x, h = [gate, up] and the plan; the activation is made again in the backward pass.

    The masters are cast to x's dtype an expert at a time, and weight gradients go straight into the stacked ones.
    """

    @staticmethod
    def forward(ctx, x_TD, weights_TK, ids_TK, w1, v1, w2):  # type: ignore[no-untyped-def]
        E, F_, D = w1.shape
        plan = make_plan(ids_TK, E)
        weight_P = _spread(weights_TK.to(torch.promote_types(x_TD.dtype, torch.float32)), plan)
        keep = any(ctx.needs_input_grad)
        h_PG, y_PD = (x_TD.new_empty(plan.bounds[-1], width) for width in (2 * F_ if keep else 0, D))
        for expert, rows, first in plan.blocks():
            if first:
                gate_up, down = _cast(x_TD.dtype, w1[expert], v1[expert]), _cast(x_TD.dtype, w2[expert])
            x = x_TD.index_select(0, plan.token_P[rows])
            h = torch.mm(x, gate_up.T, out=h_PG[rows]) if keep else x @ gate_up.T
            act = h.new_empty(len(h), F_)
            _glu(h, weight_P[rows], act)
            torch.mm(act, down, out=y_PD[rows])
        ctx.save_for_backward(x_TD, h_PG, weight_P, w1, v1, w2)
        ctx.plan = plan
        return _sum_slots(y_PD, plan.slot_TK)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, h_PG, weight_P, w1, v1, w2 = ctx.saved_tensors
        plan: Plan = ctx.plan
        E, F_, D = w1.shape
        learning = any(ctx.needs_input_grad[3:])
        grads = [torch.empty_like(w) for w in (w1, v1, w2)] if learning else []  # none where the experts are frozen
        dweight_P, dx_PD = torch.empty_like(weight_P), x_TD.new_empty(len(h_PG), D)
        dgate_up, ddown = x_TD.new_empty(2 * F_, D), x_TD.new_empty(F_, D)
        for expert in range(E):
            if plan.bounds[expert] == plan.bounds[expert + 1]:
                for whole in grads:
                    whole[expert] = 0
        for expert, rows, first in plan.blocks():
            if first:
                gate_up, down = _cast(x_TD.dtype, w1[expert], v1[expert]), _cast(x_TD.dtype, w2[expert])
            token, h = plan.token_P[rows], h_PG[rows]
            x, dy = x_TD.index_select(0, token), grad_TD.index_select(0, token)
            da, dh = dy @ down.T, torch.empty_like(h)
            act = torch.empty_like(da)
            _glu_backward(h, weight_P[rows], da, act, dh, dweight_P[rows])
            if learning:
                torch.mm(act.T, dy, out=ddown)
                torch.mm(dh.T, x, out=dgate_up)
                for whole, part in zip(grads, (dgate_up[:F_], dgate_up[F_:], ddown), strict=True):
                    whole[expert].copy_(part) if first else whole[expert].add_(part)
            torch.mm(dh, gate_up, out=dx_PD[rows])
        dx_TD = _sum_slots(dx_PD, plan.slot_TK)
        return dx_TD, dweight_P[plan.slot_TK], None, *(grads or (None, None, None))


def _spread(weights_TK: Tensor, plan: Plan) -> Tensor:
    """[P]: each row's weight, 0 where it is padding."""
    weight_P = weights_TK.new_zeros(plan.bounds[-1])
    weight_P[plan.slot_TK.flatten()] = weights_TK.flatten()
    return weight_P


def _cast(dtype: torch.dtype, *matrices: Tensor) -> Tensor:
    """The matrices below one another."""
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    out = matrices[0].new_empty(sum(len(m) for m in matrices), matrices[0].shape[1], dtype=dtype)
    return torch.cat(matrices, out=out)
