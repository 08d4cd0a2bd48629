"""The experts of a dropless mixture on CUDA: sort, gather, two grouped GEMMs, sum.

Shapes: T tokens, D model, E experts, K experts a token, F hidden, P rows sorted by expert in whole tiles, A = T*K
assignments.

After MegaBlocks (Gale et al., 2022, arXiv:2211.15841). The host never learns the routing: rows are laid out for the
most that it can need, and the offsets stay on the device. Each expert gets at least one tile, of padding if no token
chose it, because torch's grouped GEMM leaves garbage in the weight gradient of an empty group on some GPUs
(pytorch #172439).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.gpu.lazy import kernels_for


def experts(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
    """As `kernels.experts.experts`: fp32 masters may come with bf16 tokens, and their gradients come back in fp32."""
    return _Experts.apply(x_TD, weights_TK, ids_TK, w1, v1, w2)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each assignment (token * K + k) goes among the P rows; all on the device, in int32."""

    source_P: Tensor  # the assignment that a row serves; -1 in padding
    slot_TK: Tensor  # the row that an assignment fills
    ends_E: Tensor  # the end of each expert's rows; what follows the last is never read
    tile: int
    by_torch: bool


def grouped_mm_supports(dtype: str, widths: tuple[int, ...]) -> bool:
    """Whether torch's grouped GEMM has a kernel for a dtype and row widths: bf16, in multiples of 16 bytes."""
    return dtype == "bfloat16" and all(width % 8 == 0 for width in widths)


def torch_multiplies(x: Tensor, widths: tuple[int, ...]) -> bool:
    """Whether torch's grouped GEMM has a kernel for x on its device: compute capabilities 9 and 10.

    Without one, it copies the offsets to the host and loops there.
    """
    if not grouped_mm_supports(str(x.dtype).removeprefix("torch."), widths):
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def tile_rows(num_assignments: int, num_experts: int, by_torch: bool) -> int:
    """Rows to round up to. Triton's GEMM wants a tile within one expert; torch's wants none empty, and 16 bytes."""
    if by_torch or num_assignments < 64 * num_experts:
        return 16
    return 128 if num_assignments >= 512 * num_experts else 64


def make_plan(ids_TK: Tensor, num_experts: int, tile: int, by_torch: bool) -> Plan:
    A, device = ids_TK.numel(), ids_TK.device
    # A radix sort takes one pass a byte.
    narrow = torch.uint8 if num_experts <= 256 else torch.int16
    expert_A, order_A = ids_TK.flatten().to(narrow).sort(stable=True)
    numbers_E = torch.arange(num_experts, device=device).to(narrow)
    sorted_ends_E = torch.searchsorted(expert_A, numbers_E, right=True)
    counts_E = sorted_ends_E.diff(prepend=sorted_ends_E.new_zeros(1))
    padded_E = ((counts_E + tile - 1) // tile * tile).clamp(min=tile)
    ends_E = padded_E.cumsum(0)
    shift_E = (ends_E - padded_E) - (sorted_ends_E - counts_E)
    slot_A = torch.arange(A, device=device) + shift_E.index_select(0, expert_A.int())
    most = (A + num_experts * tile) // tile * tile
    source_P = torch.full((most,), -1, dtype=torch.int32, device=device).scatter_(0, slot_A, order_A.int())
    slot_TK = torch.empty(A, dtype=torch.int32, device=device).scatter_(0, order_A, slot_A.int()).view_as(ids_TK)
    return Plan(source_P=source_P, slot_TK=slot_TK, ends_E=ends_E.int(), tile=tile, by_torch=by_torch)


def rows_by_experts(a_PK: Tensor, b_EKN: Tensor, plan: Plan) -> Tensor:
    """[P, N]: each expert's rows times its matrix. Rows after the last end hold anything."""
    if plan.by_torch:
        return F.grouped_mm(a_PK, b_EKN, offs=plan.ends_E)
    rows: Tensor = kernels_for(a_PK).grouped_rows(a_PK, b_EKN, plan.ends_E, plan.tile)
    return rows


def weights_by_experts(a_PM: Tensor, b_PN: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """[E, M, N]: each expert's aᵀ b over its rows; in `dtype` from Triton, in a's from torch, which has no choice."""
    if plan.by_torch:
        return F.grouped_mm(a_PM.T, b_PN, offs=plan.ends_E)
    weights: Tensor = kernels_for(a_PM).grouped_weights(a_PM, b_PN, plan.ends_E, dtype)
    return weights


def _cast(dtype: torch.dtype, w1: Tensor, v1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """([w1, v1] below one another [E, 2F, D], so that one GEMM reads x once; w2), in `dtype`."""
    E, F_, D = w1.shape
    gate_up = w1.new_empty(E, 2 * F_, D, dtype=dtype)
    gate_up[:, :F_].copy_(w1)
    gate_up[:, F_:].copy_(v1)
    return gate_up, w2.to(dtype).contiguous()


class _Experts(torch.autograd.Function):
    """Saves x, h = [gate, up] and the plan; the activation and the cast weights are made again in the backward pass."""

    @staticmethod
    def forward(ctx, x_TD, weights_TK, ids_TK, w1, v1, w2):  # type: ignore[no-untyped-def]
        E, F_, D = w1.shape
        kernels = kernels_for(x_TD)
        by_torch = torch_multiplies(x_TD, (F_, D))
        plan = make_plan(ids_TK, E, tile_rows(ids_TK.numel(), E, by_torch), by_torch)
        gate_up, down = _cast(x_TD.dtype, w1, v1, w2)
        weights_TK = weights_TK.contiguous()
        x_PD = kernels.gather_rows(x_TD, plan.source_P, ids_TK.shape[1])
        h_PG = rows_by_experts(x_PD, gate_up.transpose(1, 2), plan)
        del x_PD
        y_PD = rows_by_experts(kernels.glu(h_PG, weights_TK, plan.source_P), down, plan)
        ctx.save_for_backward(x_TD, weights_TK, h_PG, w1, v1, w2, plan.source_P, plan.slot_TK, plan.ends_E)
        ctx.tile, ctx.by_torch = plan.tile, by_torch
        return kernels.combine_rows(y_PD, plan.slot_TK)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, weights_TK, h_PG, w1, v1, w2, source_P, slot_TK, ends_E = ctx.saved_tensors
        plan = Plan(source_P=source_P, slot_TK=slot_TK, ends_E=ends_E, tile=ctx.tile, by_torch=ctx.by_torch)
        kernels, K, F_ = kernels_for(x_TD), slot_TK.shape[1], w1.shape[1]
        gate_up, down = _cast(x_TD.dtype, w1, v1, w2)
        dy_PD = kernels.gather_rows(grad_TD, source_P, K)
        da_PF = rows_by_experts(dy_PD, down.transpose(1, 2), plan)
        act_PF, dh_PG, dweights_TK = kernels.glu_backward(h_PG, weights_TK, da_PF, source_P)
        dw2 = weights_by_experts(act_PF, dy_PD, plan, w2.dtype).to(w2.dtype)
        del act_PF, da_PF, dy_PD
        x_PD = kernels.gather_rows(x_TD, source_P, K)
        dgate_up = weights_by_experts(dh_PG, x_PD, plan, w1.dtype)
        del x_PD
        dx_TD = kernels.combine_rows(rows_by_experts(dh_PG, gate_up, plan), slot_TK)
        dw1, dv1 = (half.to(w1.dtype).contiguous() for half in (dgate_up[:, :F_], dgate_up[:, F_:]))
        return dx_TD, dweights_TK.to(weights_TK.dtype), None, dw1, dv1, dw2
