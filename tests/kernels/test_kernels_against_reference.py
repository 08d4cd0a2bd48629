"""Each fast path against its plain reference: outputs and gradients, in fp32."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gristmill.kernels.attention import document_starts, packed_attention, packed_attention_reference
from gristmill.kernels.experts import experts, experts_reference, make_plan
from gristmill.kernels.loss import cross_entropy, cross_entropy_reference


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(fast: list[Tensor], reference: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(fast) == len(reference)
    for a, b in zip(fast, reference, strict=True):
        scale = max(float(b.abs().max()), 1.0)  # sums of numbers near 1 that cancel are rounding errors of 1
        assert float((a - b).abs().max()) / scale < tolerance


def routing(T: int, E: int, K: int, skew: float) -> tuple[Tensor, Tensor]:
    """Random weights and expert ids; a large skew sends most tokens to the first experts."""
    logits = torch.randn(T, E) - skew * torch.arange(E)
    return logits.softmax(-1).topk(K, dim=-1)


@given(T=st.integers(1, 70), E=st.integers(1, 9), F=st.integers(1, 24), data=st.data())
def test_experts_match_the_reference_for_any_routing(T: int, E: int, F: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weights, ids = routing(T, E, K, skew=data.draw(st.sampled_from([0.0, 0.5, 50.0])))
    inputs = [torch.randn(T, 12), weights, *(torch.randn(E, F, 12) for _ in range(3))]
    assert_same(
        gradients(lambda x, w, *p: experts(x, w, ids, *p), inputs),
        gradients(lambda x, w, *p: experts_reference(x, w, ids, *p), inputs),
    )


def test_the_plan_gives_every_assignment_one_row_of_its_expert() -> None:
    torch.manual_seed(0)
    _, ids = routing(50, 6, 3, skew=1.0)
    plan = make_plan(ids, 6)
    slots = plan.slot_TK.flatten().tolist()
    assert len(set(slots)) == len(slots)
    for token in range(50):
        for k in range(3):
            row, expert = int(plan.slot_TK[token, k]), int(ids[token, k])
            assert plan.bounds[expert] <= row < plan.bounds[expert + 1]
            assert int(plan.token_P[row]) == token


@given(S=st.integers(1, 300), G=st.integers(1, 2), R=st.integers(1, 3), seed=st.integers(0, 99))
def test_packed_attention_matches_the_masked_reference(S: int, G: int, R: int, seed: int) -> None:
    torch.manual_seed(seed)
    starts = document_starts((torch.rand(2, S) < 0.02).cumsum(1))
    inputs = [torch.randn(2, S, heads, 8) for heads in (G * R, G, G)]
    assert_same(
        gradients(lambda q, k, v: packed_attention(q, k, v, starts), inputs),
        gradients(lambda q, k, v: packed_attention_reference(q, k, v, starts), inputs),
    )


@given(S=st.integers(2, 300), seed=st.integers(0, 1000), part=st.floats(0.01, 1.0))
def test_attention_of_the_last_queries_is_that_part_of_the_whole(S: int, seed: int, part: float) -> None:
    torch.manual_seed(seed)
    Q = max(1, int(S * part))
    q, k, v = torch.randn(2, S, 4, 8), torch.randn(2, S, 2, 8), torch.randn(2, S, 2, 8)
    starts = document_starts((torch.rand(2, S) < 0.02).cumsum(1))
    whole = packed_attention_reference(q, k, v, starts)[:, -Q:]
    assert torch.allclose(packed_attention(q[:, -Q:], k, v, starts), whole, atol=1e-5)
    assert torch.allclose(packed_attention_reference(q[:, -Q:], k, v, starts), whole, atol=1e-5)


def test_attention_never_crosses_a_document() -> None:
    torch.manual_seed(0)
    documents = torch.tensor([[0] * 100 + [1] * 90])
    starts = document_starts(documents)
    q, k, v = (torch.randn(1, 190, 2, 8) for _ in range(3))
    before = packed_attention(q, k, v, starts)
    k[:, :100], v[:, :100] = 7.0, 7.0
    assert torch.equal(before[:, 100:], packed_attention(q, k, v, starts)[:, 100:])


@pytest.mark.parametrize("T", [1, 5, 3000])
def test_chunked_cross_entropy_matches_the_reference(T: int) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 61, (T,))
    inputs = [torch.randn(T, 16), torch.randn(61, 16)]
    assert_same(
        gradients(lambda h, w: cross_entropy(h, w, targets)[0], inputs),
        gradients(lambda h, w: cross_entropy_reference(h, w, targets).sum(), inputs),
    )
    _, each = cross_entropy(*inputs, targets)
    assert_same([each], [cross_entropy_reference(*inputs, targets)])
