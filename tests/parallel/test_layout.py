"""What may lie how over how many processes, and what torch then gives each; memory that runs out."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_same_training import CFG, MODEL, batch_of
from torch import Tensor

from gristmill.errors import Failure, InputError
from gristmill.model import Transformer, init_weights
from gristmill.model.counts import count_params
from gristmill.parallel.apply import build_model
from gristmill.parallel.check import sharded_elements
from gristmill.parallel.config import Layout, ParallelConfig, lay_out
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.recipe import load_shape
from gristmill.train.balance import Balance
from gristmill.train.gradients import Gradients
from gristmill.train.loop import layout_of

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 16])


@given(st.none() | SIZES, SIZES, SIZES, SIZES, SIZES)
def test_a_layout_uses_every_process_once_or_says_why_not(
    shard: int | None, context: int, expert: int, nodes: int, each: int
) -> None:
    cfg, world_size = ParallelConfig(shard=shard, context=context, expert=expert), nodes * each
    splits = (shard or world_size // context) * context
    if world_size % context or world_size % splits or splits % expert:
        with pytest.raises(ValueError, match="must divide"):
            lay_out(cfg, world_size)
        return
    layout = lay_out(cfg, world_size)
    assert layout.world_size == world_size
    assert layout.data * layout.context == world_size
    assert layout.expert_split * layout.expert == layout.split
    assert shard is None or layout.shard == shard


def test_what_cannot_be_split_is_said_with_the_key_to_change() -> None:
    with pytest.raises(InputError, match=r"train.parallel: shard=3 x context=1 = 3 must divide the 4 processes"):
        layout_of(replace(CFG, parallel=ParallelConfig(shard=3)), MODEL, Ranks(0, 4))
    with pytest.raises(InputError, match=r"is 8 sequences of 32, which 16 processes cannot share evenly"):
        layout_of(replace(CFG, parallel=ParallelConfig()), MODEL, Ranks(0, 16))
    with pytest.raises(ValueError, match=r"seq_len=32 must be a multiple of 2 x parallel.context=5"):
        replace(CFG, parallel=ParallelConfig(context=5))
    wide = replace(CFG, batch_tokens=16 * 32, micro_batch=1, parallel=ParallelConfig(shard=None))
    for cfg, shape, ranks, said in (
        (replace(wide, batch_tokens=3 * 32, parallel=ParallelConfig(shard=3, expert=3)), MODEL, 3, "moe_num_experts=8"),
        (wide, MODEL, 16, "ffn_hidden_size=24 must be a multiple of the 16 ranks"),
        (
            replace(wide, parallel=ParallelConfig(shard=2, expert=2)),
            replace(MODEL, ffn="dense", moe_router_bias=False),
            2,
            "model.ffn=dense has no experts",
        ),
    ):
        with pytest.raises(InputError, match=said):
            layout_of(cfg, shape, Ranks(0, ranks))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dbrx-1b", Layout(1, 8, 1, 1)),
        ("dbrx-132b", Layout(1, 64, 1, 8)),
        ("dbrx-132b", Layout(12, 64, 4, 8)),  # 3,072 ranks
    ],
)
def test_torch_splits_published_shapes_over_ranks_that_are_not_there(name: str, layout: Layout) -> None:
    cfg = load_shape(name).model
    part, whole = sharded_elements(cfg, layout), count_params(cfg).total_params
    assert whole / layout.split <= part <= 1.01 * whole / layout.split


def gradients_of(model: Transformer, folder: Path, ranks: Ranks = ALONE) -> Gradients:
    cfg = replace(CFG, micro_batch=4, balance="global")
    return Gradients(model, cfg, Balance(cfg, model), 2, folder, ranks)


def small_memory(model: Transformer, most: int) -> None:
    """Forward passes over more than so many sequences do not fit."""
    forward = model.forward

    def limited(tokens: Tensor, *rest: object) -> object:
        if len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tokens, *rest)  # type: ignore[arg-type]

    model.forward = limited  # type: ignore[assignment, method-assign]


def new_model() -> Transformer:
    cfg = replace(MODEL, moe_router_bias=False, moe_loss_weight=0.0)
    return init_weights(build_model(cfg, torch.float32, "cpu"), seed=0)


def test_a_micro_batch_without_room_is_halved_until_it_has_and_stays_so(tmp_path: Path) -> None:
    plenty, little = new_model(), new_model()
    small_memory(little, 1)
    whole = gradients_of(plenty, tmp_path / "none").of(batch_of(0))
    gradients = gradients_of(little, tmp_path)
    halved = gradients.of(batch_of(0))
    assert gradients.micro_batch == 1
    assert whole.loss(1) == pytest.approx(halved.loss(1), rel=1e-6)
    for ours, theirs in zip(little.parameters(), plenty.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    assert json.loads((tmp_path / "micro_batch.json").read_text())["fits"] == 1
    assert gradients_of(little, tmp_path).micro_batch == 1
    roomier = replace(CFG, micro_batch=4, balance="global", recompute="full")
    assert Gradients(little, roomier, Balance(roomier, little), 2, tmp_path).micro_batch == 4
    (tmp_path / "micro_batch.json").write_text("{}")
    assert gradients_of(little, tmp_path).micro_batch == 4


def test_a_batch_that_starts_again_forgets_the_gradients_of_its_first_try(tmp_path: Path) -> None:
    """The first micro-batch of four sequences fits, the second does not."""
    plenty, little = new_model(), new_model()
    sizes: list[int] = []
    forward = little.forward

    def limited(tokens: Tensor, *rest: object) -> object:
        sizes.append(len(tokens))
        if sizes == [4, 4]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tokens, *rest)  # type: ignore[arg-type]

    little.forward = limited  # type: ignore[assignment, method-assign]
    for model in (plenty, little):
        gradients_of(model, tmp_path).of(batch_of(0))
    assert sizes == [4, 4, 2, 2, 2, 2]
    for ours, theirs in zip(little.parameters(), plenty.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_one_sequence_without_room_is_an_error_with_what_to_change(tmp_path: Path) -> None:
    model = new_model()
    small_memory(model, 0)
    with pytest.raises(Failure, match=r"no memory for one sequence of train.seq_len=32: set train.recompute=full"):
        gradients_of(model, tmp_path).of(batch_of(0))


@dataclass(frozen=True)
class Second(Ranks):
    """Rank 1 of two, when nobody answers."""

    rank: int = 1
    world_size: int = 2

    def sum(self, *tensors: Tensor) -> None:
        pass

    def from_first(self, number: int) -> int:
        return number


def test_one_rank_of_many_ends_and_all_begin_again_with_less(tmp_path: Path) -> None:
    model = new_model()
    small_memory(model, 2)
    with pytest.raises(Failure, match=r"rank 1 has no memory for train.micro_batch=4: 2 from here on; run the same"):
        gradients_of(model, tmp_path, Second()).of(batch_of(0))
    assert gradients_of(model, tmp_path, Second()).micro_batch == 2


def test_an_error_that_is_none_of_memory_is_not_taken_for_one(tmp_path: Path) -> None:
    model = new_model()
    broken: Callable[..., None] = lambda *_: torch.ones(2) @ torch.ones(3)  # noqa: E731
    model.forward = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="size"):
        gradients_of(model, tmp_path).of(batch_of(0))
