"""Whole tensors from split ones and back, for arithmetic that needs a matrix whole, such as Muon's.

Of N tensors alike, of which each rank has a part, every rank gets N / ranks whole: one exchange of all to all, as many
bytes as each rank has, and no tensor is whole twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

from gristmill.parallel.mesh import SPLIT


class Wholes:
    """like: one of the tensors. Where experts lie on different ranks, whole means: all of an expert."""

    def __init__(self, like: DTensor) -> None:
        names = like.device_mesh.mesh_dim_names
        assert names is not None
        self._mesh = like.device_mesh[SPLIT]
        placement = like.placements[names.index(SPLIT)]
        assert isinstance(placement, Shard)
        self._dim = placement.dim
        self._shape = list(like.to_local().shape)
        self._shape[self._dim] = like.shape[self._dim]

    def gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """This rank's part of each of N tensors -> some of them whole, stacked."""
        return self._moved(torch.stack(list(parts)), len(parts), Shard(1 + self._dim), Shard(0))

    def returned(self, wholes: Tensor, count: int) -> list[Tensor]:
        """The way back: this rank's part of all `count`."""
        return list(self._moved(wholes, count, Shard(0), Shard(1 + self._dim)).unbind())

    def _moved(self, part: Tensor, count: int, source: Placement, target: Placement) -> Tensor:
        shape = torch.Size([count, *self._shape])
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(part.contiguous(), self._mesh, [source], run_check=False, shape=shape, stride=stride)
        return whole.redistribute(placements=[target]).to_local()
