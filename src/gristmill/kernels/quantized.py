"""Matrices of small whole numbers: each group of a row's numbers shares a scale. The reference; `packed.py` is fast.

Shapes: N outputs, K inputs, J = K / group, the groups of a row; anything may stand before N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.errors import InputError

GROUPS = (32, 64, 128)
CANDIDATES = torch.linspace(0.7, 1.05, 15)  # of a group's scale, in parts of what its largest number needs


@dataclass(frozen=True)
class Quantized:
    """words: int32 [..., N, K * bits / 32], in which the codes + 2^(bits-1) lie from the lowest bits up; scales: bf16
    [..., N, J]. A number is its code times its group's scale."""

    words: Tensor
    scales: Tensor
    bits: int

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
        return to_codes(self.words, self.bits)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., N, K]: the numbers that they stand for."""
        grouped = self.codes.unflatten(-1, (-1, self.group)).float() * self.scales.float()[..., None]
        return grouped.flatten(-2).to(dtype)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """int8 [..., N, K] -> int32 [..., N, K * bits / 32]; K is a multiple of 32."""
    if bits == 8:
        return (codes.contiguous().view(torch.uint8) ^ 0x80).view(torch.int32)
    unsigned = (codes.contiguous() + 8).view(torch.uint8)
    return (unsigned[..., ::2] | unsigned[..., 1::2] << 4).view(torch.int32)


def to_codes(words: Tensor, bits: int) -> Tensor:
    """What `to_words` was given."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (unsigned ^ 0x80).view(torch.int8)
    return torch.stack((unsigned & 15, unsigned >> 4), -1).flatten(-2).view(torch.int8) - 8


def quantize(weight_NK: Tensor, bits: int, group: int) -> Quantized:
    """Nearest codes, with the scale of each group that leaves the smallest sum of squared errors of those tried.

    Raises InputError where the rows cannot be cut into such groups.
    """
    K = weight_NK.shape[-1]
    if bits not in (4, 8):
        raise InputError(f"bits={bits} must be 8 or 4")
    if group not in GROUPS or K % group:
        raise InputError(f"group={group} must be one of {GROUPS} and divide the {K} inputs of every matrix")
    x = weight_NK.float().unflatten(-1, (-1, group))
    top = 2 ** (bits - 1)
    # The code of the number that is largest in size is -top, so that it is met exactly: there is one code more below 0.
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = torch.full(largest.shape, float("inf"))
    scales = torch.zeros_like(largest)
    for candidate in CANDIDATES:
        scale = (largest / -top * candidate).bfloat16().float()
        error = (_codes(x, scale, top) * scale - x).square().sum(-1, keepdim=True)
        scales, best = torch.where(error < best, scale, scales), torch.minimum(error, best)
    codes = _codes(x, scales, top).to(torch.int8).flatten(-2)
    return Quantized(to_words(codes, bits), scales.bfloat16().squeeze(-1), bits)


def _codes(x: Tensor, scale: Tensor, top: int) -> Tensor:
    return (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-top, top - 1)
