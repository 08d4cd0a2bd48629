"""What is done to the model so that it trains on many ranks, in less memory, or compiled: steps, from outside.

A block is treated when it has just got its weights and the next has none, so that no rank ever holds the whole model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from gristmill.model import ModelConfig, Transformer
from gristmill.model.transformer import Block, MoE
from gristmill.parallel.config import Recompute
from gristmill.parallel.dispatch import split_experts
from gristmill.parallel.mesh import EXPERT, Mesh


def parallel_model(
    cfg: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    mesh: Mesh | None,
    recompute: Recompute,
    compile: bool,
) -> Transformer:
    """A model with random weights, the same ones on any number of ranks; each keeps its part.

    mesh: None leaves every weight whole. On the meta device it has shapes and no memory.
    """

    def made(block: Block) -> None:
        if mesh and mesh.layout.expert > 1 and isinstance(block.ffn, MoE):
            split_experts(block.ffn.experts, mesh.experts[EXPERT])  # before FSDP, which splits what is left
        if compile:
            apply_compile(block)  # before recompute: torch gives up on compiling what is computed again
        apply_recompute(block, recompute)
        if mesh:
            shard_block(block, mesh, dtype)

    with torch.device(device):
        model = Transformer(cfg, dtype, made)
    if mesh:
        # A popular token's gradient is a sum of thousands, which bf16 would round again and again: fp32, as the router.
        _fully_shard(model.wte, mesh, torch.float32, keep=cfg.tie_word_embeddings)  # tied, the loss needs it too
        _fully_shard(model, mesh, dtype, keep=True)  # last norm and output: gathered from a step's start to its end
    return model


def apply_compile(block: Block) -> None:
    """Compile both halves of a block for training; the kernels' own functions and FSDP's gathering stay as they are.

    In evaluation the halves run uncompiled: without gradients the native kernels are called through ctypes, which
    torch.compile cannot trace, and each new length would be compiled again.
    """
    for half in ("attended", "fed"):
        plain = getattr(block, half)
        setattr(block, half, partial(_compiled_in_training, block, torch.compile(plain), plain))


def _compiled_in_training(block: Block, compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    return (compiled if block.training else plain)(*args)


def apply_recompute(block: Block, what: Recompute) -> None:
    """Compute again in the backward pass what the forward pass then need not keep (Chen et al., 2016,
    arXiv:1604.06174). The router's jitter is drawn again from the same state.

    full: a block keeps what enters it. selective: it keeps its attention, whose cost grows with the sequence, and
    computes its experts again, whose activations are the most.
    """
    match what:
        case "none":
            pass
        case "selective":
            block.fed = partial(checkpoint, block.fed, use_reentrant=False)  # type: ignore[method-assign]
        case "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def shard_block(block: Block, mesh: Mesh, dtype: torch.dtype) -> None:
    """FSDP: a block's weights are gathered when it computes. Stacked experts are split inside each expert, so that
    there may be more ranks than experts, and each expert lies on as many ranks as the others."""
    if isinstance(block.ffn, MoE):
        # Whole experts would leave ranks without any; rows F are many and divide well.
        _fully_shard(block.ffn.experts, mesh, dtype, dim=1, experts=True)
        if dtype != torch.float32:  # the router's product is in fp32, and its weights stay so on the way
            _fully_shard(block.ffn.router, mesh, torch.float32)
    _fully_shard(block, mesh, dtype)


def _fully_shard(
    module: nn.Module, mesh: Mesh, dtype: torch.dtype, dim: int = 0, experts: bool = False, keep: bool = False
) -> None:
    """Weights travel in `dtype`, and so do a rank's gradients, summed in fp32 on the way. They are added up and not
    averaged: the loss is divided by the whole batch. keep: gathered until the backward pass is over."""
    grid = mesh.experts if experts else mesh.dense
    if EXPERT in (grid.mesh_dim_names or ()):
        grid = grid[tuple(name for name in grid.mesh_dim_names or () if name != EXPERT)]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(
        module,
        mesh=grid,
        mp_policy=policy,
        reshard_after_forward=not keep,
        shard_placement_fn=lambda param: Shard(dim),
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
