"""Quantized matrices: small integers, with one scale for each group of a row. The reference; `packed.py` is fast.

To add a width, add it to `WIDTHS` and to `Kind` in native/packed.h. Files, GGUF types, checks and the command line
follow from the table.

Shapes: N outputs, K inputs, J = K / group, the groups of a row; anything may stand before N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.errors import InputError

GROUPS = (32, 64, 128)
CANDIDATES = torch.linspace(0.7, 1.05, 15)  # of a group's scale, in parts of what its largest number needs


@dataclass(frozen=True, kw_only=True)
class Width:
    """A number of bits that codes are stored in. A byte of a word holds 8 / bits codes, the first in the lowest bits.

    kind, kernel_id: its name and its number (`Kind` in native/packed.h) among packed matrices.
    gguf: llama.cpp's type of the same width.
    """

    bits: int
    kind: str
    kernel_id: int
    gguf: str

    @property
    def top(self) -> int:
        """The number of codes below 0: codes are from -top to top - 1."""
        return 1 << (self.bits - 1)

    def pack(self, codes: Tensor) -> Tensor:
        """int8 [..., N, K] -> int32 [..., N, K * bits / 32]; K is a multiple of 32."""
        unsigned = (codes.contiguous().view(torch.uint8) + self.top) & self._mask  # wraps around at 256
        packed = unsigned[..., :: self._per_byte]
        for place in range(1, self._per_byte):
            packed = packed | unsigned[..., place :: self._per_byte] << (place * self.bits)
        return packed.contiguous().view(torch.int32)

    def unpack(self, words: Tensor) -> Tensor:
        """Return the codes that `pack` was given."""
        packed = words.contiguous().view(torch.uint8)
        parts = [packed >> (place * self.bits) & self._mask for place in range(self._per_byte)]
        return (torch.stack(parts, -1).flatten(-2) - self.top).view(torch.int8)

    @property
    def _per_byte(self) -> int:
        return 8 // self.bits

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1


WIDTHS = (
    Width(bits=4, kind="int4", kernel_id=3, gguf="q4_0"),
    Width(bits=8, kind="int8", kernel_id=2, gguf="q8_0"),
)


def width_of(bits: int) -> Width:
    """Return the width with this number of bits. Raises InputError when there is none."""
    for width in WIDTHS:
        if width.bits == bits:
            return width
    raise InputError(f"bits={bits} must be {' or '.join(str(width.bits) for width in WIDTHS)}")


@dataclass(frozen=True)
class Quantized:
    """words: int32 [..., N, K * bits / 32], in which the codes + 2^(bits-1) lie from the lowest bits up; scales: bf16
    [..., N, J]. A number is its code times its group's scale."""

    words: Tensor
    scales: Tensor
    bits: int

    @property
    def width(self) -> Width:
        return width_of(self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K]"""
        return (*self.words.shape[:-1], self.words.shape[-1] * 32 // self.bits)

    @property
    def group(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def codes(self) -> Tensor:
        """int8 [..., N, K], from -2^(bits-1) to 2^(bits-1) - 1."""
        return self.width.unpack(self.words)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., N, K]: the numbers that they stand for."""
        grouped = self.codes.unflatten(-1, (-1, self.group)).float() * self.scales.float()[..., None]
        return grouped.flatten(-2).to(dtype)


def quantize(weight_NK: Tensor, bits: int, group: int) -> Quantized:
    """Nearest codes, with the scale of each group that leaves the smallest sum of squared errors of those tried.

    Raises InputError where the rows cannot be cut into such groups.
    """
    K = weight_NK.shape[-1]
    width = width_of(bits)
    if group not in GROUPS or K % group:
        raise InputError(f"group={group} must be one of {GROUPS} and divide the {K} inputs of every matrix")
    x = weight_NK.float().unflatten(-1, (-1, group))
    top = width.top
    # The code of the number that is largest in size is -top, so that it is met exactly: there is one code more below 0.
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = torch.full(largest.shape, float("inf"))
    scales = torch.zeros_like(largest)
    for candidate in CANDIDATES:
        scale = (largest / -top * candidate).bfloat16().float()
        error = (_codes(x, scale, top) * scale - x).square().sum(-1, keepdim=True)
        scales, best = torch.where(error < best, scale, scales), torch.minimum(error, best)
    codes = _codes(x, scales, top).to(torch.int8).flatten(-2)
    return Quantized(width.pack(codes), scales.bfloat16().squeeze(-1), bits)


def _codes(x: Tensor, scale: Tensor, top: int) -> Tensor:
    return (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-top, top - 1)
