"""What the sharding really gives a rank: torch splits a model of any size over ranks that do not exist."""

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from gristmill.model import ModelConfig
from gristmill.parallel.apply import build_model
from gristmill.parallel.config import Layout
from gristmill.parallel.mesh import local, make_mesh


def sharded_elements(cfg: ModelConfig, layout: Layout, rank: int = 0) -> int:
    """Weights that `rank` has of a model: on meta tensors, in a process group that sends nothing.

    This process must not be part of another one. The layout must fit the model (`config.misfit`).
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        mesh = make_mesh(layout, "cpu", None) if layout.split > 1 else None
        model = build_model(cfg, torch.float32, "meta", mesh)
        return sum(local(param).numel() for param in model.parameters())
    finally:
        dist.destroy_process_group()
