"""Context parallelism: the ranks of a group share each sequence, and every layer gathers its keys and values.

Shapes: B sequences, S positions, Q of them on this rank, H query heads, G key/value heads, C head size.

A causal mask gives later positions more to see, so each rank takes one piece from the front and one from the back,
which evens out the work. Gathering whole keys and values, which grouped queries make small, is Llama 3's way (Dubey et
al., 2024, arXiv:2407.21783, 3.3.2); it takes any mask, and so packed documents. torch's own ring of exchanges
(torch.distributed.tensor.experimental.context_parallel) knows one causal document, and no CPU.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gristmill.kernels.attention import document_starts, packed_attention
from gristmill.model import Attend


def share_sequences(document_ids_BS: Tensor, group: Any) -> tuple[Tensor, Attend]:
    """The positions that this rank has [Q], ascending, and its attention.

    document_ids_BS: of whole sequences. S must be a multiple of twice the group's size.
    """
    rank, size, S = dist.get_rank(group), dist.get_world_size(group), document_ids_BS.shape[1]
    piece = S // (2 * size)
    assert piece * 2 * size == S
    column_S = torch.arange(S, device=document_ids_BS.device)
    pieces = column_S.view(2 * size, piece).unbind()
    both = [torch.cat([pieces[r], pieces[2 * size - 1 - r]]) for r in range(size)]
    in_order = torch.cat(both).argsort()
    ends = [(number + 1) * piece for number in (rank, 2 * size - 1 - rank)]
    starts_BS = document_starts(document_ids_BS)
    starts = [starts_BS[:, :end] for end in ends]

    def attend(layer: int, q_BQHC: Tensor, k_BQGC: Tensor, v_BQGC: Tensor) -> Tensor:
        everyones = _Gathered.apply(torch.cat([k_BQGC, v_BQGC], dim=2), group)  # [ranks, B, Q, 2 G, C]
        k_BSGC, v_BSGC = everyones.transpose(0, 1).flatten(1, 2)[:, in_order].chunk(2, dim=2)
        halves = [
            packed_attention(q, k_BSGC[:, :end], v_BSGC[:, :end], its)
            for q, end, its in zip(q_BQHC.chunk(2, dim=1), ends, starts, strict=True)
        ]
        return torch.cat(halves, dim=1)

    return both[rank], attend


class _Gathered(torch.autograd.Function):
    """All ranks' tensors, stacked; each rank's gradient is the sum of what all have of it."""

    @staticmethod
    def forward(ctx, mine, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        all_of_them = mine.new_empty(dist.get_world_size(group) * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(all_of_them, mine.contiguous(), group=group)
        return all_of_them.view(-1, *mine.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        mine = torch.empty_like(grad[0])
        dist.reduce_scatter_tensor(mine, grad.flatten(0, 1).contiguous(), group=ctx.group)
        return mine, None
