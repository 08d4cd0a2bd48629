# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
"""Triton kernels and the functions that launch them.

Shapes: T tokens, D model, E experts, K experts a token, F hidden, P rows sorted by expert in whole tiles, A = T*K
assignments, C tokens of a chunk, V vocabulary, B sequences, S positions, H heads.

`source_P` names the assignment that a row serves, -1 for padding; a padded row reads zeros and so adds none. Sums run
in fp32 and in a fixed order, without atomics: the same inputs give the same bits. Offsets are 64-bit, since rows times
columns pass 2^31 at ordinary sizes.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter holds bfloat16 as its bits, and multiplies those; there a product's operands are widened first.
_WIDEN = os.environ.get("TRITON_INTERPRET") == "1"


def _columns(width: int, limit: int) -> int:
    """A block that covers `width`, or `limit` of it: a power of two of at least 16."""
    return max(16, min(limit, triton.next_power_of_2(width)))


@triton.jit
def _gather(x, source, out, D, K, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    assignment = tl.load(source + row)
    token = (assignment // K).to(tl.int64)
    inside = (col < D)[None, :]
    value = tl.load(x + token[:, None] * D + col[None, :], mask=inside & (assignment >= 0)[:, None], other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * D + col[None, :], value, mask=inside)


def gather_rows(x_TD: Tensor, source_P: Tensor, top_k: int) -> Tensor:
    """[P, D]: the token of each row's assignment, zeros in padding."""
    x_TD, D = x_TD.contiguous(), x_TD.shape[1]
    out_PD = x_TD.new_empty(len(source_P), D)
    cols = _columns(D, 1024)
    _gather[(len(source_P) // 16, triton.cdiv(D, cols))](x_TD, source_P, out_PD, D, top_k, ROWS=16, COLS=cols)
    return out_PD


@triton.jit
def _combine(rows, slots, out, T, D, K: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (token < T)[:, None] & (col < D)[None, :]
    total = tl.zeros((TOKENS, COLS), tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slots + token * K + k, mask=token < T, other=0).to(tl.int64)
        total += tl.load(rows + slot[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64)[:, None] * D + col[None, :], total.to(out.dtype.element_ty), mask=mask)


def combine_rows(rows_PD: Tensor, slot_TK: Tensor) -> Tensor:
    """[T, D]: the sum of each token's K rows, taken in the order of k."""
    (T, K), D = slot_TK.shape, rows_PD.shape[1]
    out_TD = rows_PD.new_empty(T, D)
    cols = _columns(D, 512)
    _combine[(triton.cdiv(T, 8), triton.cdiv(D, cols))](rows_PD, slot_TK, out_TD, T, D, K=K, TOKENS=8, COLS=cols)
    return out_TD


@triton.jit
def _glu(h, weights, source, act, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    assignment = tl.load(source + row)
    weight = tl.load(weights + assignment, mask=assignment >= 0, other=0.0).to(tl.float32)
    mask = (assignment >= 0)[:, None] & (col < F)[None, :]
    at = row.to(tl.int64)[:, None] * F + col[None, :]
    gate_at = at + row.to(tl.int64)[:, None] * F
    gate = tl.load(h + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h + gate_at + F, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(act + at, value.to(act.dtype.element_ty), mask=(col < F)[None, :])


def glu(h_PG: Tensor, weights_TK: Tensor, source_P: Tensor) -> Tensor:
    """h = [gate, up]: weight * silu(gate) * up, [P, F]. The weight scales here so that y is never stored."""
    P, F = h_PG.shape[0], h_PG.shape[1] // 2
    act_PF = h_PG.new_empty(P, F)
    cols = _columns(F, 512)
    _glu[(P // 16, triton.cdiv(F, cols))](h_PG, weights_TK, source_P, act_PF, F, ROWS=16, COLS=cols)
    return act_PF


@triton.jit
def _glu_backward(h, weights, source, grad, dh, dweight, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    assignment = tl.load(source + row)
    real = assignment >= 0
    weight = tl.load(weights + assignment, mask=real, other=0.0).to(tl.float32)
    products = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, F, COLS):
        col = start + tl.arange(0, COLS)
        inside = (col < F)[None, :]
        mask = real[:, None] & inside
        at = row.to(tl.int64)[:, None] * F + col[None, :]
        gate_at = at + row.to(tl.int64)[:, None] * F
        gate = tl.load(h + gate_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + gate_at + F, mask=mask, other=0.0).to(tl.float32)
        dact = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        act = silu * up
        products += dact * act
        dact *= weight[:, None]
        dgate = dact * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(dh + gate_at, dgate.to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + gate_at + F, (dact * silu).to(dh.dtype.element_ty), mask=inside)
        tl.store(grad + at, (act * weight[:, None]).to(grad.dtype.element_ty), mask=inside)
    tl.store(dweight + assignment, tl.sum(products, 1), mask=real)


def glu_backward(h_PG: Tensor, weights_TK: Tensor, grad_PF: Tensor, source_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(activation [P, F], gradient of h [P, 2F], gradient of the weights [T, K] in fp32).

    The activation takes grad_PF's place. Each assignment has one row, so each gradient of a weight is written once.
    """
    P, F = grad_PF.shape
    dh_PG = torch.empty_like(h_PG)
    dweights_TK = torch.empty_like(weights_TK, dtype=torch.float32)
    grid = (P // 4,)
    cols = _columns(F, 512)
    _glu_backward[grid](h_PG, weights_TK, source_P, grad_PF, dh_PG, dweights_TK, F, ROWS=4, COLS=cols)
    return grad_PF, dh_PG, dweights_TK


@triton.jit
def _grouped_rows(
    a, b, out, ends, N, K, E, b_expert, b_row, b_col,
    LANES: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # A row tile's column blocks run together: they share the tile, and an expert's matrix stays in the L2 cache.
    blocks = tl.cdiv(N, COLS)
    first = (tl.program_id(0) // blocks) * TILE
    lane = tl.arange(0, LANES)
    expert = tl.sum((tl.load(ends + lane, mask=lane < E, other=2147483647) <= first).to(tl.int32), 0)
    if expert < E:
        row = (first + tl.arange(0, TILE)).to(tl.int64)
        col = ((tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
        matrix = b + expert.to(tl.int64) * b_expert
        total = tl.zeros((TILE, COLS), tl.float32)
        for start in range(0, K, DEPTH):
            k = (start + tl.arange(0, DEPTH)).to(tl.int64)
            left = tl.load(a + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
            there = (k < K)[:, None] & (col < N)[None, :]
            right = tl.load(matrix + k[:, None] * b_row + col[None, :] * b_col, mask=there, other=0.0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
        at = row[:, None] * N + col[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(col < N)[None, :])


def grouped_rows(a_PK: Tensor, b_EKN: Tensor, ends_E: Tensor, tile: int) -> Tensor:
    """[P, N]: each expert's rows times its matrix, a view perhaps. Rows after the last end are not written."""
    (P, K), (E, _, N) = a_PK.shape, b_EKN.shape
    out_PN = a_PK.new_empty(P, N)
    cols, depth = _columns(N, 128), 32 if a_PK.dtype == torch.float32 else 64
    _grouped_rows[(P // tile * triton.cdiv(N, cols),)](
        a_PK, b_EKN, out_PN, ends_E, N, K, E, *b_EKN.stride(),
        LANES=triton.next_power_of_2(E), TILE=tile, COLS=cols, DEPTH=depth, WIDEN=_WIDEN,
        num_warps=8 if tile > 64 else 4,
    )  # fmt: skip
    return out_PN


@triton.jit
def _grouped_weights(
    a, b, out, ends, M, N,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, COLS)
    each = tl.cdiv(M, ROWS) * blocks
    expert = tl.program_id(0) // each
    block = tl.program_id(0) % each
    m = ((block // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n = ((block % blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, DEPTH):
        row = (start + tl.arange(0, DEPTH)).to(tl.int64)
        left = tl.load(a + row[None, :] * M + m[:, None], mask=(row < end)[None, :] & (m < M)[:, None], other=0.0)
        right = tl.load(b + row[:, None] * N + n[None, :], mask=(row < end)[:, None] & (n < N)[None, :], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    at = (expert.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def grouped_weights(a_PM: Tensor, b_PN: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, M, N]: each expert's aᵀ b over its rows, summed in fp32 and stored in `dtype`."""
    M, N, E = a_PM.shape[1], b_PN.shape[1], len(ends_E)
    out_EMN = a_PM.new_empty(E, M, N, dtype=dtype)
    rows, cols = _columns(M, 128), _columns(N, 128)
    _grouped_weights[(E * triton.cdiv(M, rows) * triton.cdiv(N, cols),)](
        a_PM, b_PN, out_EMN, ends_E, M, N, ROWS=rows, COLS=cols, DEPTH=32, WIDEN=_WIDEN, num_warps=8
    )
    return out_EMN


@triton.jit
def _loss(logits, targets, nll, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * V
    target = tl.load(targets + row)
    # Read before the first reduction, which all threads wait for: below, the gradient takes the logits' place.
    at_target = tl.load(base + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    highest = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(base + col, mask=col < V, other=-float("inf")).to(tl.float32)
        risen = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - risen) + tl.sum(tl.exp(x - risen), 0)
        highest = risen
    tl.store(nll + row, tl.log(total) + highest - at_target)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(base + col, mask=col < V, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - highest) / total - (col == target).to(tl.float32)
        tl.store(base + col, grad.to(logits.dtype.element_ty), mask=col < V)


def loss_in_place(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Negative log-likelihoods [C] in fp32; their gradient takes the logits' place."""
    C, V = logits_CV.shape
    nll_C = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    _loss[(C,)](logits_CV, targets_C, nll_C, V, BLOCK=_columns(V, 4096), num_warps=8)
    return nll_C


@triton.jit
def _rotate(
    x, cos, sin, seen, out, S, H, HALF, turned, clip,
    x_sequence, x_position, x_head, seen_sequence, seen_position, seen_head,
    CLIP: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS).to(tl.int64)[:, None]
    col = tl.arange(0, COLS)[None, :]
    mask = (head < H) & (col < HALF)
    at = (token // S) * x_sequence + (token % S) * x_position + head * x_head + col
    a = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if CLIP and not BACKWARD:  # comparisons, so that NaN stays NaN
        a = tl.where(a > clip, clip, tl.where(a < -clip, -clip, a))
        b = tl.where(b > clip, clip, tl.where(b < -clip, -clip, b))
    c = tl.load(cos + token * HALF + col, mask=(head < turned) & (col < HALF), other=1.0)
    s = tl.load(sin + token * HALF + col, mask=(head < turned) & (col < HALF), other=0.0)
    if BACKWARD:
        s = -s
    first, second = a * c - b * s, b * c + a * s
    if CLIP and BACKWARD:
        at = (token // S) * seen_sequence + (token % S) * seen_position + head * seen_head + col
        first = tl.where(tl.abs(tl.load(seen + at, mask=mask, other=0.0).to(tl.float32)) <= clip, first, 0.0)
        second = tl.where(tl.abs(tl.load(seen + at + HALF, mask=mask, other=0.0).to(tl.float32)) <= clip, second, 0.0)
    at = (token * H + head) * (2 * HALF) + col
    tl.store(out + at, first.to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + HALF, second.to(out.dtype.element_ty), mask=mask)


def rotate_heads(
    x_BSNC: Tensor, cos: Tensor, sin: Tensor, turned: int, clip: float, seen_BSNC: Tensor | None = None
) -> Tensor:
    """[B, S, N, C]: clamped to ±clip, the first heads turned. cos and sin are contiguous, [B, S, 1, C / 2] in fp32.

    With `seen_BSNC` x is the gradient, and that the clamped input: turned back, zero where the clamp cut (where clip is
    infinite it is not read).
    """
    B, S, N, C = x_BSNC.shape
    out = torch.empty((B, S, N, C), dtype=x_BSNC.dtype, device=x_BSNC.device)
    seen = x_BSNC if seen_BSNC is None else seen_BSNC
    _rotate[(B * S,)](
        x_BSNC, cos, sin, seen, out, S, N, C // 2, turned, clip, *x_BSNC.stride()[:3], *seen.stride()[:3],
        CLIP=clip < float("inf"), BACKWARD=seen_BSNC is not None,
        HEADS=triton.next_power_of_2(N), COLS=triton.next_power_of_2(C // 2), num_warps=4,
    )  # fmt: skip
    return out
