"""Each rank initializes its own part of a split model, with the bits that one process gets."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from ranks import Processes
from torch import Tensor
from torch.distributed.tensor import DTensor

from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.model import init as initialization
from gristmill.parallel.apply import build_model
from gristmill.parallel.config import ParallelConfig, lay_out
from gristmill.parallel.mesh import local, make_mesh, part_of
from gristmill.parallel.ranks import Ranks

MODEL = ModelConfig(
    d_model=32, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=24, moe_num_experts=8, moe_top_k=2,
    vocab_size=101, max_seq_len=32, moe_router_bias=True, qk_norm=True,
)  # fmt: skip
WAYS = {
    "fsdp": ParallelConfig(shard=None),
    "hsdp": ParallelConfig(shard=2),
    "ep": ParallelConfig(shard=None, expert=4),
    "ep x fsdp": ParallelConfig(shard=None, expert=2),
    "ep x hsdp": ParallelConfig(shard=2, expert=2),
}


def initial_weights(ranks: Ranks, cfg: ModelConfig, parallel: ParallelConfig) -> tuple[dict[str, Tensor], float]:
    """The whole tensors, gathered from the ranks, and the share of the parameters that this rank stores."""
    model = build_model(cfg, torch.float32, "cpu", make_mesh(lay_out(parallel, ranks.world_size), "cpu"))
    with patch.object(initialization, "PIECE_NUMEL", 100):  # a few rows: parts begin and end inside of pieces
        init_weights(model, 3, part_of)
    stored = sum(local(param).numel() for param in model.parameters()) / sum(p.numel() for p in model.parameters())
    tensors = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, stored


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_initial_weights_of_4_ranks_are_those_of_one_process(way: str, tied: bool, four: Processes) -> None:
    cfg = replace(MODEL, tie_word_embeddings=tied)
    with patch.object(initialization, "PIECE_NUMEL", 100):
        expected = init_weights(Transformer(cfg), 3).state_dict()
    for found, stored_share in four.run(initial_weights, cfg, WAYS[way]):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert stored_share < 0.6
