"""Attention over packed documents on CUDA: FlashAttention (Dao, 2023, arXiv:2307.08691) as torch carries it.

Shapes: B sequences, S positions, H query heads, G key/value heads, C head size, N documents of the whole batch; Q
queries and S keys where a rank has a part of the queries, and then N parts of documents.

The batch is one row of B*S tokens in which each document is a sequence of its own. How many there are shapes the
kernel's grid, and in its backward pass each costs 128 rows of fp32 scratch, so B*S is no bound to allocate for: the
number is read from the device, once per batch and not per layer.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary

from gristmill.kernels.attention_reference import packed_attention_reference

# torch 2.11 groups heads without being asked.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_segments: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_attention(q_BQHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, starts_BS: Tensor) -> Tensor:
    """As `kernels.attention.packed_attention`. What FlashAttention does not take (fp32, odd head sizes) runs masked."""
    (B, Q, _H, C), S = q_BQHC.shape, k_BSGC.shape[1]
    if q_BQHC.dtype not in (torch.bfloat16, torch.float16) or C % 8 or C > 256:
        return packed_attention_reference(q_BQHC, k_BSGC, v_BSGC, starts_BS)
    known = _segments.setdefault(starts_BS, {})
    if Q not in known:
        known[Q] = segments(starts_BS, Q)
    its = known[Q]
    q, k, v = (x.flatten(0, 1) for x in (q_BQHC, k_BSGC, v_BSGC))
    if its.seen is not None:
        k, v = k[its.seen], v[its.seen]
    # The causal mask ends at the last query and the last key of each segment.
    out = varlen_attn(q, k, v, its.queries_N, its.keys_N, Q, S, window_size=(-1, 0), **_GROUPED)
    assert isinstance(out, Tensor)
    return out.view(B, Q, *out.shape[1:])


@dataclass(frozen=True)
class Segments:
    """What the queries have of each document. `queries_N`, `keys_N`: [N + 1] in int32, where each begins among the
    flattened queries and the flattened keys that are seen, then the end. `seen`: those keys' places; None: all."""

    queries_N: Tensor
    keys_N: Tensor
    seen: Tensor | None


def segments(starts_BS: Tensor, num_queries: int) -> Segments:
    """Of S positions the queries are the last. Waits for the device."""
    S = starts_BS.shape[1]
    position_S = torch.arange(S, device=starts_BS.device)
    starts_BQ, position_Q = starts_BS[:, -num_queries:], position_S[-num_queries:]
    is_first_BQ = (starts_BQ == position_Q) | (position_Q == S - num_queries)
    first_N = is_first_BQ.flatten().nonzero().flatten()
    queries_N = torch.cat([first_N, first_N.new_tensor([is_first_BQ.numel()])]).int()
    if num_queries == S:
        return Segments(queries_N, queries_N, None)
    before_N = (position_Q - starts_BQ).flatten()[first_N]  # a document's keys that lie before its first query here
    keys_N = F.pad((queries_N.diff() + before_N).cumsum(0), (1, 0)).int()
    seen = (position_S >= starts_BQ[:, :1]).flatten().nonzero().flatten()
    return Segments(queries_N, keys_N, seen)
