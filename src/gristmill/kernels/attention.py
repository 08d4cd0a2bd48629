"""Causal attention over packed documents: a token sees the earlier tokens of its own document.

Shapes: B sequences, S positions, H query heads, G key/value heads, C head size; Q queries and S keys where a rank has a
part of the queries.

A document is a contiguous run, so the keys that query i may see are the range from its document's start to i.
The fast paths walk tiles of queries and multiply each with the keys from the earliest start to the tile's end: half of
the square that a masked attention computes, and less where documents are short. The softmax is recomputed in the
backward pass from its log-sum-exp (FlashAttention, Dao et al., 2022, arXiv:2205.14135). native/attention.h keeps a
tile's scores in the cache; here they go through matrix products of PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels import native
from gristmill.kernels.attention_reference import packed_attention_reference as packed_attention_reference
from gristmill.kernels.gpu import attention as gpu_attention
from gristmill.kernels.precision import upcast

TILE_QUERIES = 128


def document_starts(document_ids_BS: Tensor) -> Tensor:
    """[B, S]: for each position the first position of its document."""
    S = document_ids_BS.shape[1]
    index = torch.arange(S, device=document_ids_BS.device).expand_as(document_ids_BS)
    is_start = F.pad(document_ids_BS[:, 1:] != document_ids_BS[:, :-1], (1, 0), value=True)
    return torch.where(is_start, index, 0).cummax(1).values


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what documents there are is read from the device
def packed_attention(q_BQHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, starts_BS: Tensor) -> Tensor:
    """Compute the same function as `packed_attention_reference` in tiles; on CUDA with torch's FlashAttention."""
    if q_BQHC.is_cuda:
        return gpu_attention.packed_attention(q_BQHC, k_BSGC, v_BSGC, starts_BS)
    if native.serves(q_BQHC) and q_BQHC.shape[3] % 2 == 0 and q_BQHC.shape[1] == k_BSGC.shape[1]:
        return _NativeAttention.apply(q_BQHC, k_BSGC, v_BSGC, starts_BS)
    return _PackedAttention.apply(q_BQHC, k_BSGC, v_BSGC, starts_BS)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSHC, k_BSGC, v_BSGC, starts_BS):  # type: ignore[no-untyped-def]
        out_BSHC, lse_BHS = torch.ops.gristmill.attention(q_BSHC, k_BSGC, v_BSGC, starts_BS)
        ctx.save_for_backward(q_BSHC, k_BSGC, v_BSGC, starts_BS, out_BSHC, lse_BHS)
        return out_BSHC

    @staticmethod
    def backward(ctx, grad_BSHC):  # type: ignore[no-untyped-def]
        return *torch.ops.gristmill.attention_backward(*ctx.saved_tensors, grad_BSHC), None


class _PackedAttention(torch.autograd.Function):
    """Heads that share a key head lie together as rows of one GEMM: [B*G, R*T, C] x [B*G, C, L], R = H / G."""

    @staticmethod
    def forward(ctx, q_BQHC, k_BSGC, v_BSGC, starts_BS):  # type: ignore[no-untyped-def]
        B, Q, H, C = q_BQHC.shape
        S, G = k_BSGC.shape[1:3]
        q = (upcast(q_BQHC) * C**-0.5).to(q_BQHC.dtype).view(B, Q, G, H // G, C).permute(0, 2, 3, 1, 4).contiguous()
        k = k_BSGC.permute(0, 2, 1, 3).reshape(B * G, S, C)
        v = v_BSGC.permute(0, 2, 1, 3).reshape(B * G, S, C)
        out = torch.empty_like(q)  # [B, G, R, Q, C]
        tiles = _tiles(starts_BS, S - Q)
        for queries, keys in tiles:
            probs = _probabilities(q[:, :, :, queries], k[:, keys], starts_BS, keys)
            rows = torch.bmm(probs.flatten(2, 3).flatten(0, 1), v[:, keys])
            out[:, :, :, queries] = rows.view(B, G, H // G, -1, C)
        ctx.save_for_backward(q, k, v, starts_BS)
        ctx.tiles = tiles
        return out.permute(0, 3, 1, 2, 4).reshape(B, Q, H, C)

    @staticmethod
    def backward(ctx, grad_BQHC):  # type: ignore[no-untyped-def]
        q, k, v, starts_BS = ctx.saved_tensors
        B, G, R, Q, C = q.shape
        S = k.shape[1]
        grad = grad_BQHC.view(B, Q, G, R, C).permute(0, 2, 3, 1, 4).contiguous()
        dq, sums = torch.empty_like(q), torch.promote_types(q.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=sums), torch.zeros_like(v, dtype=sums)
        for queries, keys in ctx.tiles:
            q_tile = q[:, :, :, queries].reshape(B * G, -1, C)
            grad_tile = grad[:, :, :, queries].reshape(B * G, -1, C)
            probs = _probabilities(q[:, :, :, queries], k[:, keys], starts_BS, keys)
            probs = probs.view(B * G, -1, probs.shape[-1])
            dprobs = torch.bmm(grad_tile, v[:, keys].transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            dv[:, keys] += torch.bmm(probs.transpose(1, 2), grad_tile)
            dq[:, :, :, queries] = torch.bmm(dscores, k[:, keys]).view(B, G, R, -1, C)
            dk[:, keys] += torch.bmm(dscores.transpose(1, 2), q_tile)
        dq = (upcast(dq) * C**-0.5).to(q.dtype).permute(0, 3, 1, 2, 4).reshape(B, Q, G * R, C)
        dk, dv = (d.to(k.dtype).view(B, G, S, C).transpose(1, 2) for d in (dk, dv))
        return dq, dk, dv, None


def _probabilities(q_tile: Tensor, k_tile: Tensor, starts_BS: Tensor, keys: slice) -> Tensor:
    """[B, G, R, T, L] of T queries against L keys, in their dtype. A tile's last query is its last key's position."""
    B, G, R, T, C = q_tile.shape
    scores = torch.bmm(q_tile.reshape(B * G, R * T, C), k_tile.transpose(1, 2)).view(B, G, R, T, -1)
    key, query = torch.arange(keys.start, keys.stop), torch.arange(keys.stop - T, keys.stop)
    hidden = (key > query[:, None]) | (key < starts_BS[:, query, None])
    bias = scores.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    return scores.add_(bias[:, None, None]).softmax(-1)


def _tiles(starts_BS: Tensor, before: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of each tile. Keys begin at a tile boundary, so that few shapes occur.

    before: positions whose queries are not here; queries count from there.
    """
    tiles = []
    for first in range(before, starts_BS.shape[1], TILE_QUERIES):
        last = min(first + TILE_QUERIES, starts_BS.shape[1])
        earliest = int(starts_BS[:, first].min()) // TILE_QUERIES * TILE_QUERIES
        tiles.append((slice(first - before, last - before), slice(earliest, last)))
    return tiles
