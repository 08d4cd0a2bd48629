"""A row of a product has the same bits in any batch, and is the product's; the layers leave the model as it is."""

import random
from collections.abc import Callable

import pytest
import torch

from gristmill.inference.invariant import SIZES, TILE, TorchLayers, experts, linear, pieces
from gristmill.kernels.experts import experts_reference
from gristmill.model import Transformer

Tiny = Callable[..., Transformer]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (25, 4), (33, 104), (24, 25), (1, 7), (512, 300), (8, 1)])
def test_a_row_of_a_product_has_the_same_bits_in_any_company(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    chance, draw = torch.Generator().manual_seed(0), random.Random(0)
    x = torch.randn(400, inputs, generator=chance).to(dtype)
    weight = torch.randn(3, outputs, inputs, generator=chance).to(dtype)[1]  # an expert's, which begins anywhere
    alone = torch.cat([linear(row[None], weight) for row in x])
    torch.testing.assert_close(alone.double(), x.double() @ weight.double().T, atol=0.05, rtol=0.02)
    for _ in range(30):
        first, rows = draw.randrange(300), draw.choice((2, 3, 8, 15, 16, 17, 31, 64, 100))
        order = torch.randperm(rows, generator=chance) + first
        assert torch.equal(linear(x[first : first + rows], weight), alone[first : first + rows])
        assert torch.equal(linear(x[order], weight), alone[order])


def test_pieces_cover_all_rows_with_sizes_that_agree_and_little_to_spare() -> None:
    for agreeing in ({TILE}, set(SIZES), {TILE, 128}, {1, TILE, 64}):
        for rows in range(1, 700):
            sizes = list(pieces(rows, agreeing.__contains__))
            assert set(sizes) <= agreeing
            assert sum(sizes[:-1]) < rows <= sum(sizes) < max(1.5 * rows + 1, rows + TILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts_", "top_k", "hidden"), [(4, 2, 24), (16, 4, 33), (3, 3, 1), (1, 1, 64)])
def test_experts_are_the_references_and_a_tokens_bits_do_not_depend_on_the_others(
    dtype: torch.dtype, experts_: int, top_k: int, hidden: int
) -> None:
    chance = torch.Generator().manual_seed(0)
    w1, v1, w2 = (torch.randn(experts_, hidden, 40, generator=chance) * 0.2 for _ in range(3))
    x = torch.randn(70, 40, generator=chance).to(dtype)
    weights, ids = torch.rand(70, experts_, generator=chance).softmax(-1).topk(top_k)
    together = experts(x, weights, ids, w1, v1, w2)
    wanted = experts_reference(x.double(), weights, ids, w1, v1, w2)
    torch.testing.assert_close(together.double(), wanted, atol=0.06 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    for rows in (slice(0, 1), slice(3, 20), slice(69, 70), slice(30, 70)):
        assert torch.equal(experts(x[rows], weights[rows], ids[rows], w1, v1, w2), together[rows])


def test_layers_leave_the_models_modules_as_they_are(tiny: Tiny) -> None:
    for changes in ({}, {"ffn": "dense"}):
        model = tiny(**changes)
        before = {module: dict(vars(module)) for module in model.modules()}
        tree = TorchLayers(model).tree
        assert {module: vars(module) for module in model.modules()} == before
        assert tree.blocks[1].attn.Wqkv.product is not model.blocks[1].attn.Wqkv.product
        assert all(a is b for a, b in zip(tree.parameters(), model.parameters(), strict=True))
