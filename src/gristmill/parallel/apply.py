"""Parallelism, compilation and recompute, applied to a model from outside: a flat, ordered list of steps.

A model is built on the meta device, changed by these steps, and only then allocated, so no rank ever holds the whole
model. Its weights are then initialized or loaded, each rank its part.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from gristmill.model import ModelConfig, Recompute, Transformer
from gristmill.model.transformer import Block, MoE
from gristmill.parallel.dispatch import split_experts
from gristmill.parallel.mesh import EXPERT, Mesh


def build_model(
    cfg: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    mesh: Mesh | None = None,
    recompute: Recompute = "none",
    compile: bool = False,
) -> Transformer:
    """Build this rank's part of a model for training. Its weights are allocated but not initialized.

    Args:
        device: Where the weights are stored; on the meta device they take no memory.
        mesh: The ranks that share the model; None keeps every weight whole.
    """
    with torch.device("meta"):
        model = Transformer(cfg, dtype)
    parallelize(model, mesh, recompute, compile)
    return model.to_empty(device=device)


def parallelize(model: Transformer, mesh: Mesh | None, recompute: Recompute, compile: bool) -> None:
    """Prepare a model for training, in this order:"""
    if mesh:
        apply_expert_parallel(model, mesh)  # before FSDP, which splits the experts that remain on this rank
    if compile:
        apply_compile(model)  # before FSDP, whose hooks on modules must run outside of the compiled functions
    apply_recompute(model, recompute)  # may come anywhere: it runs the halves of a block, compiled or not
    if mesh:
        apply_fsdp(model, mesh)  # last: it splits the parameters that the other steps have left


def apply_expert_parallel(model: Transformer, mesh: Mesh) -> None:
    """Keep this rank's share of each block's experts, and send tokens to the ranks that have theirs."""
    if mesh.layout.expert == 1:
        return
    for block in _blocks(model):
        if isinstance(block.ffn, MoE):
            split_experts(block.ffn.experts, mesh.experts[EXPERT])


def apply_compile(model: Transformer) -> None:
    """Compile both halves of each block for training; the kernels' own functions and FSDP's gathering stay as they are.

    Without gradients the halves run uncompiled: the native kernels are then called through ctypes, which torch.compile
    cannot trace, and each new length would be compiled again.
    """
    for block in _blocks(model):
        block.compiled_halves = torch.compile(block.attention_half), torch.compile(block.ffn_half)


def apply_recompute(model: Transformer, recompute: Recompute) -> None:
    """Save memory: compute activations again in the backward pass instead of keeping them.

    full: a block keeps only its input. selective: it also keeps the activations of its attention, whose cost grows with
    the sequence, and recomputes its experts, which have the most activations.
    """
    for block in _blocks(model):
        block.recompute = recompute


def apply_fsdp(model: Transformer, mesh: Mesh) -> None:
    """Split all weights over the ranks (FSDP2); each module gathers its own when it computes.

    Stacked experts are split inside each expert, so that there may be more ranks than experts, and every rank has the
    same share of each expert.
    """
    dtype = model.compute_dtype
    for block in _blocks(model):
        if isinstance(block.ffn, MoE):
            # Whole experts would leave ranks without any; rows F are many and divide well.
            _fully_shard(block.ffn.experts, mesh, dtype, dim=1, experts=True)
            if dtype != torch.float32:  # the router computes in fp32, so its weights are gathered in fp32
                _fully_shard(block.ffn.router, mesh, torch.float32)
        _fully_shard(block, mesh, dtype)
    # A popular token's gradient is a sum of thousands, which bf16 would round each time: fp32, as for the router.
    # With tied embeddings the loss needs the weight too, so it stays gathered.
    _fully_shard(model.wte, mesh, torch.float32, keep=model.cfg.tie_word_embeddings)
    _fully_shard(model, mesh, dtype, keep=True)  # last norm and output: gathered from a step's start to its end


def _blocks(model: Transformer) -> Sequence[Block]:
    return list(model.blocks)  # type: ignore[arg-type]


def _fully_shard(
    module: nn.Module, mesh: Mesh, dtype: torch.dtype, dim: int = 0, experts: bool = False, keep: bool = False
) -> None:
    """Split a module's weights. They are gathered in `dtype`; gradients are summed over the ranks in fp32.

    Gradients are added and not averaged: the loss is divided by the whole batch.

    keep: Keep the weights gathered until the backward pass ends.
    """
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
