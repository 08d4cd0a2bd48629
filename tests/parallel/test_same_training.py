"""Three steps on 2 and 4 ranks, however the model is split over them, are three steps of one process: each loss, each
gradient, each weight; with experts that are unequally busy, and one that gets nothing; several micro-batches a rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Processes
from torch import Tensor
from torch.distributed.tensor import DTensor

from gristmill.kernels.loss import cross_entropy
from gristmill.model import ModelConfig, Recompute, Transformer, init_weights, packed
from gristmill.parallel.apply import build_model
from gristmill.parallel.config import ParallelConfig, lay_out
from gristmill.parallel.mesh import Mesh, make_mesh
from gristmill.parallel.mesh import part_of as stored_part
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.streaming import Batch
from gristmill.streaming.order import boundaries
from gristmill.train.balance import Balance
from gristmill.train.config import OptimizerConfig, TrainConfig
from gristmill.train.gradients import Gradients
from gristmill.train.optimizer import Optimizer

SEQUENCES, LENGTH, VOCABULARY = 8, 32, 101  # a prime: no split is even
MODEL = ModelConfig(
    d_model=32, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=24, moe_num_experts=8, moe_top_k=2,
    vocab_size=VOCABULARY, max_seq_len=LENGTH, moe_loss_weight=0.1, moe_router_bias=True,
    moe_normalize_expert_weights=None,  # else an idle expert's gradient is rounding errors, which AdamW inflates
)  # fmt: skip
CFG = TrainConfig(steps=3, batch_tokens=SEQUENCES * LENGTH, seq_len=LENGTH, micro_batch=1, balance="bias")
WAYS = {
    "fsdp": ParallelConfig(shard=None),
    "hsdp": ParallelConfig(shard=2),
    "ep": ParallelConfig(shard=None, expert=4),
    "ep x fsdp": ParallelConfig(shard=None, expert=2),
    "ep x hsdp": ParallelConfig(shard=2, expert=2),
    "cp": ParallelConfig(shard=1, context=4),
    "cp x fsdp": ParallelConfig(shard=2, context=2),
    "cp x ep x fsdp": ParallelConfig(shard=2, context=2, expert=2),
    "cp x replicas": ParallelConfig(shard=1, context=2),
}
Found = tuple[list[float], list[list[list[int]]], dict[str, Tensor], dict[str, Tensor]]


def batch_of(step: int) -> Batch:
    """Documents that end anywhere."""
    chance = np.random.default_rng(step)
    ids = chance.integers(0, VOCABULARY, (SEQUENCES, LENGTH + 1))
    starts = [np.sort(chance.choice(LENGTH, int(chance.integers(0, 5)), replace=False)) for _ in range(SEQUENCES)]
    positions, documents = boundaries(starts, LENGTH)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), positions, documents, np.arange(SEQUENCES) % 2)


def part_of(batch: Batch, number: int, count: int) -> Batch:
    rows = slice(number * SEQUENCES // count, (number + 1) * SEQUENCES // count)
    return Batch(*(array[rows] for array in vars(batch).values()))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def unequal(model: Transformer) -> None:
    """Expert 0 is never chosen, 1 and 2 more often than the others."""
    for block in model.blocks:
        block.ffn.router_bias[:3] += torch.tensor([-10.0, 0.05, 0.02])


def new_model(cfg: ModelConfig, dtype: torch.dtype, mesh: Mesh | None, recompute: Recompute = "none") -> Transformer:
    """The seed is one of those where no token is so close to two experts that rounding decides between them."""
    return init_weights(build_model(cfg, dtype, "cpu", mesh, recompute), seed=1, part_of=stored_part)


def three_steps(ranks: Ranks, cfg: TrainConfig, model_cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> Found:
    """Losses, assignments, the gradients of the last step and the weights after it."""
    layout = lay_out(cfg.parallel, ranks.world_size)
    mesh: Mesh | None = make_mesh(layout, "cpu") if layout.split > 1 else None
    model = new_model(model_cfg, dtype, mesh, cfg.recompute)
    if model_cfg.moe_router_bias:
        unequal(model)
    optimizer = Optimizer(cfg.optimizer, model, ranks, layout.replicate)
    balance = Balance(cfg, model, ranks)
    gradients = Gradients(model, cfg, balance, 2, Path("nowhere"), ranks, mesh)
    losses, counts, grads = [], [], {}
    for step in range(cfg.steps):
        mine = part_of(batch_of(step), ranks.rank // layout.context, layout.data)
        sums = gradients.of(mine)
        losses.append(sums.loss(cfg.batch_tokens) + float(sums.balance))
        counts.append(sums.counts_LE.long().tolist())
        norm = optimizer.clip()
        grads = {name: whole(param.grad) for name, param in model.named_parameters()}
        grads["norm"] = torch.tensor(norm)
        optimizer.step(0.01)
        balance.after(sums.counts_LE)
    return losses, counts, grads, {name: whole(tensor) for name, tensor in model.state_dict().items()}


def assert_same(found: Found, expected: Found, apart: float = 1e-4) -> None:
    assert found[0] == pytest.approx(expected[0], rel=apart / 10)
    if apart == 1e-4:
        assert found[1] == expected[1]
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert ours.keys() == theirs.keys()
        far = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
        assert max(far.values(), default=0.0) < apart, {name: value for name, value in far.items() if value >= apart}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("way", WAYS)
def test_four_ranks_train_as_one(way: str, optimizer: Any, four: Processes) -> None:
    cfg = replace(CFG, optimizer=OptimizerConfig(name=optimizer, lr=0.01))
    expected = three_steps(ALONE, cfg, MODEL)
    idle_and_busy = np.array(expected[1])[:, :, :2].sum((0, 1))
    assert idle_and_busy[0] == 0
    assert idle_and_busy[1] > 1.5 * np.array(expected[1]).sum() / MODEL.moe_num_experts
    for found in four.run(three_steps, replace(cfg, parallel=WAYS[way]), MODEL):
        assert_same(found, expected)


SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "dense": {"ffn": "dense", "moe_router_bias": False},
    "rms_norm": {"norm": "rms_norm", "qk_norm": True},
}


@pytest.mark.parametrize(
    ("shape", "recompute", "way"),
    [
        ("tied", "none", "hsdp"),
        ("dense", "full", "fsdp"),
        ("rms_norm", "selective", "cp x ep x fsdp"),
        ("rms_norm", "full", "ep x hsdp"),
    ],
)
def test_other_shapes_and_what_is_computed_again_are_no_exception(
    shape: str, recompute: Any, way: str, four: Processes
) -> None:
    balance: Any = "micro_batch" if shape == "dense" else "bias"
    cfg, model_cfg = replace(CFG, recompute=recompute, balance=balance), replace(MODEL, **SHAPES[shape])
    expected = three_steps(ALONE, replace(cfg, recompute="none"), model_cfg)
    for found in four.run(three_steps, replace(cfg, parallel=WAYS[way]), model_cfg):
        assert_same(found, expected)


@pytest.mark.parametrize("way", ["fsdp", "cp x ep x fsdp"])
def test_in_bf16_the_ranks_stay_as_close_as_rounding_allows(way: str, four: Processes) -> None:
    """One step: what rounding tips over a router's edge goes another way from there on. The embedding's gradient, a sum
    over many tokens, is fp32 everywhere."""
    cfg = replace(CFG, steps=1)
    expected = three_steps(ALONE, cfg, MODEL, torch.bfloat16)
    for found in four.run(three_steps, replace(cfg, parallel=WAYS[way]), MODEL, torch.bfloat16):
        assert_same((found[0], found[1], found[2], {}), (expected[0], expected[1], expected[2], {}), 0.02)


def one_step_in_bf16(ranks: Ranks, cfg: TrainConfig) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Four sequences at a time: the gradients before the optimizer, and what each router computed, in order."""
    layout = lay_out(cfg.parallel, ranks.world_size)
    mesh = make_mesh(layout, "cpu") if layout.split > 1 else None
    model = new_model(replace(MODEL, moe_router_bias=False), torch.bfloat16, mesh)
    logits: list[Tensor] = []
    for block in model.blocks:
        block.ffn.router.register_forward_hook(lambda router, inputs, output: logits.append(output.detach().clone()))
    mine = part_of(batch_of(0), ranks.rank, ranks.world_size)
    Gradients(model, cfg, Balance(cfg, model, ranks), 2, Path("nowhere"), ranks, mesh).of(mine)
    return {name: whole(param.grad) for name, param in model.named_parameters()}, logits


def test_two_ranks_in_bf16_are_two_micro_batches_of_one_process_bit_for_bit(two: Processes) -> None:
    """A rank's gradients travel in bf16 and are added in fp32, as one process adds those of its micro-batches. Routers
    stay fp32 on the way. A sum in bf16, or a router that travels in bf16, would change bits."""
    cfg = replace(CFG, balance="micro_batch", micro_batch=SEQUENCES // 2)
    grads, logits = one_step_in_bf16(ALONE, cfg)
    assert not all(torch.equal(grad, grad.bfloat16().float()) for grad in grads.values())  # else bf16 would do
    found = two.run(one_step_in_bf16, replace(cfg, parallel=ParallelConfig(shard=2)))
    for rank, (theirs, routed) in enumerate(found):
        assert [name for name in grads if not torch.equal(grads[name], theirs[name])] == []
        assert routed[0].dtype == torch.float32
        expected = logits[rank * MODEL.n_layers : (rank + 1) * MODEL.n_layers]
        assert all(map(torch.equal, routed, expected))
        assert len(routed) == len(expected)


def gathered_after_forward(ranks: Ranks) -> dict[str, bool]:
    """Weight -> whether a rank has all of it after the forward pass, or its part again."""
    mesh = make_mesh(lay_out(ParallelConfig(shard=2), ranks.world_size), "cpu")
    model = new_model(replace(MODEL, moe_router_bias=False), torch.float32, mesh)
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    model(tokens, torch.arange(LENGTH).expand(2, -1), packed(tokens))
    return {name: not isinstance(param, DTensor) for name, param in model.named_parameters()}


def test_a_blocks_weights_are_let_go_after_its_forward_pass_and_the_outputs_are_kept(two: Processes) -> None:
    for gathered in two.run(gathered_after_forward):
        assert {name for name, whole_here in gathered.items() if whole_here} == {"norm_f.weight", "lm_head.weight"}


def popular_token(ranks: Ranks, dtype: torch.dtype, shard: int) -> Tensor:
    """The gradient of the embedding of a token that is half of the text."""
    layout = lay_out(ParallelConfig(shard=shard), ranks.world_size)
    mesh = make_mesh(layout, "cpu") if layout.split > 1 else None
    model = new_model(MODEL, dtype, mesh)
    tokens = torch.randint(0, VOCABULARY, (512, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[:, ::2] = 7
    mine = tokens.chunk(layout.data)[ranks.rank]
    hidden, _ = model(mine, torch.arange(LENGTH).expand_as(mine), packed(torch.zeros_like(mine)))
    nll, _ = cross_entropy(hidden.flatten(0, 1), model.output_weight, mine.roll(-1, 1).flatten())
    nll.backward()
    return whole(model.wte.weight.grad)[7]


def test_in_bf16_a_popular_tokens_gradient_is_not_worn_away(two: Processes) -> None:
    """It is a sum of a thousand small numbers."""
    exact = popular_token(ALONE, torch.float32, 1)
    for found in two.run(popular_token, torch.bfloat16, 2):
        assert float((found - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("way", ["fsdp", "ep", "cp"])
def test_the_balancing_loss_of_two_ranks_is_that_of_the_whole_batch(way: str, two: Processes) -> None:
    ways = {"fsdp": ParallelConfig(shard=2), "ep": ParallelConfig(shard=2, expert=2), "cp": ParallelConfig(context=2)}
    cfg = replace(CFG, balance="global", parallel=ways[way], micro_batch=SEQUENCES)
    shape = replace(MODEL, moe_router_bias=False)
    expected = three_steps(ALONE, replace(cfg, parallel=ParallelConfig()), shape)
    for found in two.run(three_steps, cfg, shape):
        assert_same(found, expected)


@pytest.mark.parametrize(("balance", "micro_batch"), [("rank", SEQUENCES // 2), ("micro_batch", 1)])
def test_a_ranks_balancing_loss_is_that_of_its_own_sequences(balance: Any, micro_batch: int, two: Processes) -> None:
    """One process that takes each rank's sequences as a micro-batch counts the same."""
    cfg = replace(CFG, balance=balance, parallel=ParallelConfig(shard=2), micro_batch=micro_batch)
    shape = replace(MODEL, moe_router_bias=False)
    expected = three_steps(ALONE, replace(cfg, balance="micro_batch", parallel=ParallelConfig()), shape)
    for found in two.run(three_steps, cfg, shape):
        assert_same(found, expected)
