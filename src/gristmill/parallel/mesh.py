"""The ranks of a sharded training as grids: one for the experts, one for everything else."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from gristmill.parallel.config import Layout

REPLICATE, SPLIT, EXPERT, CONTEXT = "replicate", "split", "expert", "context"


@dataclass(frozen=True)
class Mesh:
    """`dense` is (replicate x split), `experts` (replicate x split x expert), where expert's neighbours have other
    experts; sizes of 1 are left out, but for `split`. `context`: the group of those that share a sequence, or None."""

    layout: Layout
    dense: DeviceMesh
    experts: DeviceMesh
    context: Any


def make_mesh(layout: Layout, device: str) -> Mesh:
    """All ranks call it, in the order that `Layout` says."""
    dense = _grid(device, {REPLICATE: layout.replicate, SPLIT: layout.split})
    experts = dense
    if layout.expert > 1:
        experts = _grid(device, {REPLICATE: layout.replicate, SPLIT: layout.expert_split, EXPERT: layout.expert})
    context = None
    if layout.context > 1:
        context = _grid(device, {SPLIT: layout.data, CONTEXT: layout.context})[CONTEXT].get_group()
    return Mesh(layout, dense, experts, context)


def _grid(device: str, sizes: dict[str, int]) -> DeviceMesh:
    kept = {name: size for name, size in sizes.items() if size > 1 or name == SPLIT}
    return init_device_mesh(device, tuple(kept.values()), mesh_dim_names=tuple(kept))


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
