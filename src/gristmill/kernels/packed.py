"""Matrices arranged once for products with few rows or many, each weight read once, in order: native/packed.h.

No batch changes a bit: a row's sums are added in one order, whatever rows stand beside it.

Shapes: T tokens, K inputs, N outputs; E experts, D model, F hidden; P panels of `native.constants().panel` outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels import native
from gristmill.kernels.arguments import Matrix
from gristmill.kernels.memory import CACHE_LINE, use_huge_pages
from gristmill.kernels.quantized import WIDTHS, Quantized

Kind: TypeAlias = str
# A matrix's kind -> its number in native/packed.h. bf16_12: bf16 in 12 bits.
KINDS: dict[Kind, int] = {"f32": 0, "bf16": 1, "bf16_12": 4} | {width.kind: width.kernel_id for width in WIDTHS}
# Who decodes 12 bits while the memory brings the next: a plain CPU does it byte by byte; AMX's tiles would wait for it.
SHORTENING = ("avx2", "avx512", "avx512_bf16")


@dataclass(frozen=True)
class Packed:
    """A matrix [N, K] as bytes. `group`: inputs that share a scale, 0 where there are none."""

    data: Tensor
    kind: Kind
    N: int
    K: int
    group: int = 0

    @cached_property
    def described(self) -> Matrix:
        return Matrix(self.data.data_ptr(), KINDS[self.kind], self.N, self.K, self.group)


def pack(weight: Tensor | Quantized, shorten: bool = True) -> Packed:
    """weight: [N, K] in fp32 or bf16, or quantized. shorten: bf16 to 12 bits where its exponents are few enough, which
    changes no weight and no bit of a product."""
    assert native.in_use() != "torch"
    panel, depth = native.constants().panel, native.constants().depth
    if isinstance(weight, Quantized):
        N, K = weight.shape
        made = aligned_empty(-(-N // panel) * panel * (K * weight.bits // 8 + K // weight.group * 2))
        native.lay_quantized(weight.words, weight.scales, weight.bits, made)
        return Packed(made, weight.width.kind, N, K, weight.group)
    N, K = weight.shape
    is_float = weight.dtype == torch.float32
    if shorten and not is_float and native.in_use() in SHORTENING and (short := _shortened(weight)) is not None:
        return short
    if weight.stride(0) == 1 < N:  # [K, N] in memory
        x_KN = F.pad(weight.T, (0, -N % panel, 0, -K % depth))
        if not is_float:  # two inputs of an output go together
            x_KN = torch.stack((x_KN[::2], x_KN[1::2]), -1).view(torch.int32).squeeze(-1)
        panels = x_KN.unflatten(1, (-1, panel)).transpose(0, 1)  # [P, K, panel]
    else:
        x_NK = F.pad(weight, (0, -K % depth, 0, -N % panel)).contiguous()
        units = x_NK if is_float else x_NK.view(torch.int32)
        panels = torch.ops.gristmill.lay_panels(units.unflatten(0, (-1, panel)))
    return Packed(_aligned(panels), "f32" if is_float else "bf16", N, K)


def _shortened(weight: Tensor) -> Packed | None:
    (N, K), inputs, panel = weight.shape, native.padded(weight.shape[1]), native.constants().panel
    # Of a panel: `Short`, room for exceptions, 12 bits a weight.
    made = aligned_empty(-(-N // panel) * (128 + -(-inputs // 64) * 64 + inputs * panel * 3 // 2))
    return Packed(made, "bf16_12", N, K) if native.lay_halves(weight, made) else None


def aligned_empty(num_bytes: int) -> Tensor:
    """uint8, from the beginning of a cache line."""
    made = torch.empty(num_bytes + CACHE_LINE, dtype=torch.uint8)
    use_huge_pages(made)
    return made[-made.data_ptr() % CACHE_LINE :][:num_bytes]


def _aligned(x: Tensor) -> Tensor:
    """Its bytes."""
    made = aligned_empty(x.numel() * x.element_size())
    made.view(x.dtype).view(x.shape).copy_(x)
    return made


def product(x_TK: Tensor, matrix: Packed) -> Tensor:
    """x Wᵀ: [T, N] in x's dtype, which is that of a matrix that is not quantized."""
    return native.product(x_TK, matrix.described)


@dataclass(frozen=True)
class PackedExperts:
    """blocks [S, bytes]: in each the panels of one expert, of w1 and v1 in turn, then of w2ᵀ. slots [E]: which block is
    an expert's."""

    blocks: Tensor
    slots: Tensor
    kind: Kind
    F: int
    group: int

    @cached_property
    def places(self) -> Tensor:
        """[E]: addresses."""
        return self.slots * self.blocks.stride(0) + self.blocks.data_ptr()


def pack_experts(
    w1: Tensor | Quantized, v1: Tensor | Quantized, w2: Tensor | Quantized, shorten: bool = True
) -> PackedExperts:
    """w1, v1, w2: [E, F, D], or [F, D] of one expert; of a quantized w2 its transpose, [E, D, F]. shorten: as in
    `pack`, where it can be done to all."""
    blocks, kinds = torch.empty(0), set[Kind]()
    for number, matrices in enumerate(zip(*map(_each, (w1, v1)), _each(w2, transposed=True), strict=True)):
        parts = [pack(matrix, shorten) for matrix in matrices]
        kinds |= {part.kind for part in parts}
        if len(kinds) > 1:
            return pack_experts(w1, v1, w2, shorten=False)
        if number == 0:
            E, bytes_ = len(_each(w1)), sum(part.data.numel() for part in parts)
            blocks = aligned_empty(E * bytes_).view(E, bytes_)
        gate, up, down = (part.data.view(-(-part.N // native.constants().panel), -1) for part in parts)
        torch.cat([torch.stack((gate, up), 1).flatten(), down.flatten()], out=blocks[number])
    return PackedExperts(blocks, torch.arange(len(blocks)), parts[0].kind, parts[0].N, parts[0].group)


def _each(w: Tensor | Quantized, transposed: bool = False) -> Sequence[Tensor | Quantized]:
    """The experts' own matrices."""
    if isinstance(w, Quantized):
        pairs = zip(_stacked(w.words), _stacked(w.scales), strict=True)
        return [Quantized(words, scales, w.bits) for words, scales in pairs]
    return [each.T for each in _stacked(w)] if transposed else list(_stacked(w))


def _stacked(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x[None]


def experts(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, packed: PackedExperts) -> Tensor:
    """What `kernels.experts.experts` computes, forward only. weights_TK in fp32."""
    return native.packed_experts(x_TD, weights_TK, ids_TK, packed.places, KINDS[packed.kind], packed.F, packed.group)
