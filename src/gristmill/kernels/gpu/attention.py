"""Attention over packed documents on CUDA: FlashAttention (Dao, 2023, arXiv:2307.08691) as torch carries it.

Shapes: B sequences, S positions, H query heads, G key/value heads, C head size, N documents of the whole batch.

The batch is one row of B*S tokens in which each document is a sequence of its own. How many there are shapes the
kernel's grid, and in its backward pass each costs 128 rows of fp32 scratch, so B*S is no bound to allocate for: the
number is read from the device, once per batch and not per layer.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary

# torch 2.11 groups heads without being asked.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_bounds: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_attention(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, starts_BS: Tensor) -> Tensor:
    """As `kernels.attention.packed_attention`. What FlashAttention does not take (fp32, odd head sizes) runs masked."""
    B, S, _H, C = q_BSHC.shape
    if q_BSHC.dtype not in (torch.bfloat16, torch.float16) or C % 8 or C > 256:
        from gristmill.kernels.attention import packed_attention_reference  # it calls this module

        return packed_attention_reference(q_BSHC, k_BSGC, v_BSGC, starts_BS)
    if starts_BS not in _bounds:
        _bounds[starts_BS] = document_bounds(starts_BS)
    bounds_N = _bounds[starts_BS]
    q, k, v = (x.flatten(0, 1) for x in (q_BSHC, k_BSGC, v_BSGC))
    out = varlen_attn(q, k, v, bounds_N, bounds_N, S, S, window_size=(-1, 0), **_GROUPED)
    assert isinstance(out, Tensor)
    return out.view(B, S, *out.shape[1:])


def document_bounds(starts_BS: Tensor) -> Tensor:
    """[N + 1] in int32: where each document begins in the flattened batch, then the end. Waits for the device."""
    is_start_BS = starts_BS == torch.arange(starts_BS.shape[1], device=starts_BS.device)
    first_N = is_start_BS.flatten().nonzero().flatten()
    return torch.cat([first_N, first_N.new_tensor([starts_BS.numel()])]).int()
