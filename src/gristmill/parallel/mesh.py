"""The ranks of a sharded training as grids: one for the experts, one for everything else."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gristmill.model.init import Part, whole
from gristmill.parallel.config import Layout
from gristmill.parallel.ranks import TIMEOUT_S

REPLICATE, SPLIT, EXPERT, DATA, CONTEXT = "replicate", "split", "expert", "data", "context"


@dataclass(frozen=True)
class Mesh:
    """`dense` is (replicate x split), `experts` (replicate x split x expert), where expert's neighbours have other
    experts; sizes of 1 are left out, but for `split`. `context`: the group of those that share a sequence, or None."""

    layout: Layout
    dense: DeviceMesh
    experts: DeviceMesh
    context: Any


def make_mesh(layout: Layout, device: str, timeout_s: float | None = TIMEOUT_S) -> Mesh:
    """All ranks call it; they lie as `Layout` says. timeout_s: as long as a rank waits for another inside the model;
    None for ranks that are not there."""
    dense = _grid(device, {REPLICATE: layout.replicate, SPLIT: layout.split})
    experts = dense
    if layout.expert > 1:
        experts = _grid(device, {REPLICATE: layout.replicate, SPLIT: layout.expert_split, EXPERT: layout.expert})
    grids, context = [dense, experts], None
    if layout.context > 1:
        grids.append(_grid(device, {DATA: layout.data, CONTEXT: layout.context}))
        context = grids[-1][CONTEXT].get_group()
    if timeout_s is not None:
        for group in (group for grid in grids for group in grid.get_all_groups()):
            _set_pg_timeout(timedelta(seconds=timeout_s), group)
    return Mesh(layout, dense, experts, context)


def _grid(device: str, sizes: dict[str, int]) -> DeviceMesh:
    kept = {name: size for name, size in sizes.items() if size > 1 or name == SPLIT}
    return init_device_mesh(device, tuple(kept.values()), mesh_dim_names=tuple(kept))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank stores; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> Part:
    """The part of a tensor that this rank stores, and where it begins in the whole."""
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
    return Part(local(tensor), tensor.shape, start)
