"""Expert parallelism: each rank has some of the experts, and tokens travel to those that they were routed to.

Shapes: T tokens of this rank, D model, E experts, K experts a token, R rows that arrive here, W ranks.

`split_experts` sets `Experts.compute`. Each (token, k) pair is a row. Rows are sorted by expert, which also sorts them
by rank; each rank sends them with their weights, computes its own experts on the rows that arrive, and returns the
results, which are summed per token (GShard, Lepikhin et al., 2020, arXiv:2006.16668, without its capacity: a rank
accepts all rows that are sent to it).
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from gristmill.kernels.experts import experts
from gristmill.model.transformer import Experts
from gristmill.parallel.mesh import local


def split_experts(module: Experts, mesh: DeviceMesh) -> None:
    """Keep only this rank's share of the experts, and exchange tokens with the ranks that have the others."""
    for name in ("w1", "v1", "w2"):
        whole = getattr(module, name).detach()
        part = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)  # all have the whole: nothing is sent
        setattr(module, name, torch.nn.Parameter(part))
    module.compute = partial(dispatch, mesh.get_group())


def dispatch(
    group: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, w1: Tensor, v1: Tensor, w2: Tensor
) -> Tensor:
    """`kernels.experts.experts`, with rows exchanged among the ranks of `group`, and so are their gradients.

    w1, v1, w2: this rank's experts, as DTensors or local.
    """
    w1, v1, w2 = (local(weight) for weight in (w1, v1, w2))
    (T, K), W, here = ids_TK.shape, dist.get_world_size(group), len(w1)
    order = ids_TK.flatten().argsort(stable=True)
    counts_E = torch.zeros(W * here, dtype=torch.long, device=x_TD.device)
    counts_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK).flatten())  # bincount would wait for a GPU
    arriving_E = torch.empty_like(counts_E)  # W ranks x our experts
    dist.all_to_all_single(arriving_E, counts_E, group=group)
    rows_2W = torch.stack([counts_E, arriving_E]).view(2, W, here).sum(2)
    sent, received = rows_2W.tolist()  # waits for the device
    x_RD = _Exchanged.apply(x_TD[order // K], received, sent, group)
    weights_R = _Exchanged.apply(weights_TK.flatten()[order], received, sent, group)
    ids_R = torch.arange(here, device=x_TD.device).repeat(W).repeat_interleave(arriving_E, output_size=sum(received))
    y_RD = experts(x_RD, weights_R[:, None], ids_R[:, None], w1, v1, w2)
    rows_AD = _Exchanged.apply(y_RD, sent, received, group)
    slot_A = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=order.device))
    return F.embedding_bag(slot_A.view(T, K), rows_AD, mode="sum")


class _Exchanged(torch.autograd.Function):
    """Rows to and from every rank, so many each; gradients the other way round."""

    @staticmethod
    def forward(ctx, rows, received, sent, group):  # type: ignore[no-untyped-def]
        ctx.of = received, sent, group
        return _exchanged(rows, received, sent, group)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        received, sent, group = ctx.of
        return _exchanged(grad, sent, received, group), None, None, None


def _exchanged(rows: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
