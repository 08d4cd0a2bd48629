"""Whole tensors from split ones and back, for arithmetic that needs a matrix whole, such as Muon's.

Of N tensors alike, of which each rank has a part, every rank gets N / ranks whole: one exchange of all to all, as many
bytes as each rank has, and no tensor is whole twice.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from gristmill.parallel.mesh import SPLIT


class Wholes:
    """`count` parts like `part`: a rank's part of `like`, or, of a split stack, of one of its matrices."""

    def __init__(self, like: DTensor, part: Tensor, count: int) -> None:
        mesh, dim = _split_of(like)
        self._group, self._rank, self._shape = mesh.get_group(), mesh.get_local_rank(), tuple(part.shape)
        self._dim = dim - (like.ndim - part.ndim)
        self._sizes = _shares(like.shape[dim], mesh.size())  # along the split dimension, as FSDP cuts it
        self._counts = _shares(count, mesh.size())  # of tensors that each rank gets whole

    @staticmethod
    def at_once(like: DTensor, part: Tensor, numel: int) -> int:
        """How many to make whole together, so that each rank gets one, or so many that they hold `numel` numbers."""
        mesh, dim = _split_of(like)
        whole = part.numel() // max(1, part.shape[dim - (like.ndim - part.ndim)]) * like.shape[dim]
        return mesh.size() * max(1, numel // max(1, whole))

    def gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """This rank's part of each tensor -> some of them whole, stacked."""
        mine = self._counts[self._rank]
        sent = torch.stack(list(parts)).flatten()
        pieces = self._exchanged(sent, self._numels(self._counts), [mine * self._numel(size) for size in self._sizes])
        shaped = [piece.view(mine, *self._of(size)) for piece, size in zip(pieces, self._sizes, strict=True)]
        return torch.cat(shaped, dim=1 + self._dim)

    def returned(self, wholes: Tensor) -> list[Tensor]:
        """The way back: this rank's part of all of them."""
        mine = len(wholes)
        sent = torch.cat([piece.flatten() for piece in wholes.split(self._sizes, dim=1 + self._dim)])
        pieces = self._exchanged(sent, [mine * self._numel(size) for size in self._sizes], self._numels(self._counts))
        shaped = [piece.view(count, *self._shape) for piece, count in zip(pieces, self._counts, strict=True)]
        return [part for piece in shaped for part in piece.unbind()]

    def _exchanged(self, sent: Tensor, sizes: list[int], arriving: list[int]) -> Sequence[Tensor]:
        received = sent.new_empty(sum(arriving))
        dist.all_to_all_single(received, sent, arriving, sizes, group=self._group)
        return received.split(arriving)

    def _numels(self, counts: list[int]) -> list[int]:
        return [count * self._numel(self._sizes[self._rank]) for count in counts]

    def _numel(self, size: int) -> int:
        return torch.Size(self._of(size)).numel()

    def _of(self, size: int) -> tuple[int, ...]:
        """A part's shape, of so many along the split dimension."""
        return (*self._shape[: self._dim], size, *self._shape[self._dim + 1 :])


def _split_of(like: DTensor) -> tuple[DeviceMesh, int]:
    names = like.device_mesh.mesh_dim_names
    assert names is not None
    placement = like.placements[names.index(SPLIT)]
    assert isinstance(placement, Shard)
    return like.device_mesh[SPLIT], placement.dim


def _shares(count: int, ranks: int) -> list[int]:
    """As torch.chunk cuts: the first ranks have as many as any, the last may have fewer, or none."""
    most = -(-count // ranks)
    return [max(0, min(most, count - rank * most)) for rank in range(ranks)]
