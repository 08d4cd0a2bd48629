"""The C++ kernels, in each instruction set that this machine runs, against float64 references: values and gradients.

fp32 within 1e-5 of the largest number; bf16 within a few roundings of it. AMX is emulated, too.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.errors import InputError
from gristmill.kernels import native
from gristmill.kernels.attention import document_starts, packed_attention, packed_attention_reference
from gristmill.kernels.experts import experts, experts_reference
from gristmill.kernels.loss import cross_entropy, cross_entropy_reference
from gristmill.kernels.norm import rms_norm
from gristmill.kernels.rotary import rotary_angles, rotate, rotate_reference
from gristmill.kernels.router import route, route_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
DTYPES = sorted(TOLERANCE, key=str)
in_every_way = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and each input's gradient, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).bfloat16().to(out.dtype))  # what every dtype holds exactly
    return [x.double() for x in (out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def assert_near(
    fast: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    """Both see inputs that `dtype` holds exactly."""
    inputs = [x.to(dtype).double() for x in inputs]
    given, wanted = gradients(fast, inputs, dtype), gradients(reference, inputs, torch.float64)
    assert len(given) == len(wanted)
    for a, b in zip(given, wanted, strict=True):
        scale = max(float(b.abs().max()), 1.0)  # sums of numbers near 1 that cancel are rounding errors of 1
        assert float((a - b).abs().max()) / scale < TOLERANCE[dtype]


@in_every_way
@given(
    S=st.integers(1, 200), G=st.integers(1, 2), R=st.integers(1, 3), C=st.integers(1, 80), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_attention(kernels: str, S: int, G: int, R: int, C: int, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    starts = document_starts((torch.rand(2, S) < 0.02).cumsum(1))
    inputs = [torch.randn(2, S, heads, C) for heads in (G * R, G, G)]
    assert_near(
        lambda q, k, v: packed_attention(q, k, v, starts),
        lambda q, k, v: packed_attention_reference(q, k, v, starts),
        inputs,
        dtype,
    )


@in_every_way
@given(
    T=st.integers(1, 20), E=st.integers(1, 70), data=st.data(), power=st.sampled_from((None, 1.0, 2.0, 3.0)),
    has_bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_routing(
    kernels: str, T: int, E: int, data: st.DataObject, power: float | None, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    top_k, bias_E = data.draw(st.integers(1, min(E, 9))), torch.randn(E) / 9 if has_bias else None
    logits_TE = torch.randn(T, E).bfloat16().float()
    probs_TE, _, ids_TK = route(logits_TE, bias_E, top_k, power)
    score_TE = probs_TE if bias_E is None else probs_TE + bias_E
    descending = score_TE.sort(descending=True, stable=True)
    assert torch.equal(score_TE.gather(1, ids_TK), descending.values[:, :top_k])
    if kernels != "torch":  # which says nothing of equal ones
        assert torch.equal(ids_TK, descending.indices[:, :top_k])

    def reference(logits_TE: Tensor) -> Tensor:
        """With the choice given, which rounding may turn."""
        probs_TE = logits_TE.softmax(-1)
        weights_TK = probs_TE.gather(-1, ids_TK)
        return torch.cat([probs_TE, weights_TK if power is None else F.normalize(weights_TK, p=power, dim=-1)], 1)

    assert_near(lambda x: torch.cat(route(x, bias_E, top_k, power)[:2], 1), reference, [logits_TE], torch.float32)
    expected = route_reference(logits_TE.double(), None if bias_E is None else bias_E.double(), top_k, power)
    torch.testing.assert_close(route(logits_TE, bias_E, top_k, power)[1].double(), expected[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_routed_to_experts_that_exist(kernels: str, bad: float) -> None:
    with torch.no_grad():
        ids_TK = route(torch.full((3, 5), bad), None, 4, 1.0)[2]
    assert ((ids_TK >= 0) & (ids_TK < 5)).all()


@in_every_way
@given(
    T=st.integers(1, 90), E=st.integers(1, 9), F=st.integers(1, 40), data=st.data(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_experts(kernels: str, T: int, E: int, F: int, data: st.DataObject, dtype: torch.dtype) -> None:
    """Among them experts without tokens, all tokens on one expert, one token, each token on all experts."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    K, skew = data.draw(st.integers(1, E)), data.draw(st.sampled_from([0.0, 0.5, 50.0]))
    weights, ids = (torch.randn(T, E) - skew * torch.arange(E)).softmax(-1).topk(K, dim=-1)
    assert_near(
        lambda x, w, *p: experts(x, w, ids, *p),
        lambda x, w, *p: experts_reference(x, w, ids, *p),
        [torch.randn(T, 12), weights, *(torch.randn(E, F, 12) * 0.3 for _ in range(3))],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_with_more_rows_than_a_block(
    kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gristmill.kernels.experts as module

    monkeypatch.setattr(module, "BLOCK_ROWS", 128)
    torch.manual_seed(0)
    weights, ids = (torch.randn(400, 3) - torch.arange(3)).softmax(-1).topk(2, dim=-1)
    assert_near(
        lambda x, w, *p: experts(x, w, ids, *p),
        lambda x, w, *p: experts_reference(x, w, ids, *p),
        [torch.randn(400, 12), weights, *(torch.randn(3, 8, 12) * 0.3 for _ in range(3))],
        dtype,
    )


@in_every_way
@given(
    S=st.integers(1, 9), N=st.integers(1, 5), half=st.integers(1, 40), clip=st.sampled_from([None, 0.75]),
    dtype=st.sampled_from(DTYPES), data=st.data(),
)  # fmt: skip
def test_rotation(
    kernels: str, S: int, N: int, half: int, clip: float | None, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Queries and keys turn, values do not; what is clipped has no gradient."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    turned = data.draw(st.integers(1, N))
    cos, sin = rotary_angles(torch.randint(0, 999, (2, S)), 2 * half, 1e4)
    bound = float("inf") if clip is None else clip
    assert_near(
        lambda x: rotate(x, cos, sin, turned, clip),
        lambda x: rotate_reference(x, cos, sin, turned, bound),
        [torch.randn(2, S, N, 2 * half)],
        dtype,
    )


@in_every_way
@given(T=st.integers(1, 40), V=st.integers(1, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_cross_entropy(kernels: str, T: int, V: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    targets = torch.randint(0, V, (T,))
    assert_near(
        lambda h, w: cross_entropy(h, w, targets)[0],
        lambda h, w: cross_entropy_reference(h, w, targets).sum(),
        [torch.randn(T, 16), torch.randn(V, 16)],
        dtype,
    )


@in_every_way
@given(N=st.integers(1, 90), D=st.integers(1, 70), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_rms_norm(kernels: str, N: int, D: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(D)
    assert_near(
        lambda x: rms_norm(x, weight.to(x.dtype if x.dtype == torch.float64 else torch.float32), 1e-5),
        lambda x: F.rms_norm(x, (D,), weight.double(), 1e-5),
        [torch.randn(N, D)],
        dtype,
    )
    assert_near(
        lambda w: rms_norm(torch.ones(N, D, dtype=dtype) * 3, w.float(), 1e-5),
        lambda w: F.rms_norm(torch.ones(N, D, dtype=torch.float64) * 3, (D,), w, 1e-5),
        [weight],
        dtype,
    )


def test_numbers_that_do_not_lie_together(kernels: str) -> None:
    """Queries, keys and values are slices of one projection; one head of several is a row with gaps."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 4, 8), torch.randn(8)
    cos, sin = rotary_angles(torch.arange(5).expand(2, -1), 8, 1e4)
    starts = torch.zeros(2, 1, dtype=torch.long).expand(2, 5)
    for part in (x[:, :, 1:2], x[:, :, :3], x.transpose(0, 1)[:, :, 2:3].transpose(0, 1), x.flip(3)):
        whole = part.contiguous()
        assert torch.equal(rms_norm(part, weight, 1e-5), rms_norm(whole, weight, 1e-5))
        assert torch.equal(rotate(part, cos, sin), rotate(whole, cos, sin))
        keys = part[:, :, :1]
        assert torch.equal(packed_attention(part, keys, keys, starts), packed_attention(whole, keys, keys, starts))


def test_another_default_dtype_and_one_rows_positions_change_nothing(kernels: str) -> None:
    torch.manual_seed(0)
    x, weight, targets = torch.randn(2, 5, 4, 8), torch.randn(8), torch.tensor([0, 3])
    one, both = (rotary_angles(torch.arange(5).expand(rows, -1), 8, 1e4) for rows in (1, 2))

    def all_of(angles: tuple[Tensor, Tensor]) -> list[Tensor]:
        turned = rotate(x, *angles)
        attended = packed_attention(turned, turned, turned, torch.zeros(2, 5, dtype=torch.long))
        return [attended, rms_norm(attended, weight, 1e-5), cross_entropy(x[0, 0, :2], x[1, 0], targets)[1]]

    wanted = all_of(both)
    torch.set_default_dtype(torch.bfloat16)
    try:
        given = all_of(one)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize("target", [-100, 4])
def test_a_target_outside_the_vocabulary_is_refused(kernels: str, target: int) -> None:
    with pytest.raises(ValueError, match="a vocabulary of 4 has 0 and up"):
        cross_entropy(torch.randn(1, 8), torch.randn(4, 8), torch.tensor([target]))


def test_what_a_kernel_cannot_read_is_refused() -> None:
    q, starts = torch.randn(1, 4, 2, 8), torch.zeros(1, 4, dtype=torch.long)
    for wrong in (
        (q.bfloat16(), q, q, starts),
        (q, q, q, starts.int()),
        (q, q[:, :3], q, starts),
        (q, q, q, starts[0]),
    ):
        with pytest.raises(ValueError, match="a native kernel got"):
            torch.ops.gristmill.attention(*wrong)
    with pytest.raises(ValueError, match="a native kernel got"):
        torch.ops.gristmill.rms_norm(q[0, 0], torch.ones(4), 1e-5)


def test_a_library_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, opened_anew: Callable[[], object]
) -> None:
    monkeypatch.setattr(native, "INTERFACE", -1)
    assert opened_anew() is None


def test_frozen_experts_cost_no_gradient(kernels: str) -> None:
    torch.manual_seed(0)
    weights, ids = torch.randn(9, 4).softmax(-1).topk(2, dim=-1)
    x, matrices = torch.randn(9, 8, requires_grad=True), [torch.randn(4, 6, 8) for _ in range(3)]
    experts(x, weights, ids, *matrices).sum().backward()
    frozen, x.grad = x.grad, None
    learning = [m.requires_grad_() for m in matrices]
    out = experts(x, weights, ids, *learning)
    out.sum().backward()
    assert torch.equal(x.grad, frozen)
    with torch.no_grad():
        assert torch.equal(experts(x, weights, ids, *learning), out)


def test_what_is_not_a_number_stays_so(kernels: str) -> None:
    """A diverged model must be seen: a NaN that is rounded to bf16 may not become a number."""
    x = torch.full((1, 2, 2, 8), float("nan"), dtype=torch.bfloat16)
    cos, sin = rotary_angles(torch.arange(2)[None], 8, 1e4)
    assert rotate(x, cos, sin).isnan().all()
    assert packed_attention(x, x, x, torch.zeros(1, 2, dtype=torch.long)).isnan().all()
    assert cross_entropy(x[0, 0], torch.ones(4, 8), torch.zeros(2, dtype=torch.long))[0].isnan()


def test_the_operators_know_their_shapes_without_computing(built: None) -> None:
    """What torch.compile and torch.export ask of an operator."""
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 1, 8)
    starts = torch.zeros(1, 4, dtype=torch.long)
    cos, sin = (x.reshape(4, -1) for x in rotary_angles(torch.arange(4)[None], 8, 1e4))
    operators, checks = torch.ops.gristmill, ("test_schema", "test_faketensor")
    out, lse = operators.attention(q, k, k, starts)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.attention, (q, k, k, starts)),
        (operators.attention_backward, (q, k, k, starts, out, lse, q)),
        (operators.rotate, (q[0], cos, sin, 1, 8.0)),
        (operators.rotate_backward, (q[0], cos, sin, 1, 8.0, q[0])),
        (operators.rms_norm, (q[0, 0], cos[0].new_ones(8), 1e-5)),
        (operators.rms_norm_backward, (q[0, 0], cos[0].new_ones(8), torch.ones(2), q[0, 0])),
        (operators.cross_entropy, (torch.randn(3, 5), torch.zeros(3, dtype=torch.long))),
        (operators.glu, (torch.randn(3, 8), torch.ones(3), torch.empty(3, 4))),
        (operators.glu_backward, (*map(torch.ones, ((3, 8), 3, (3, 4), (3, 4), (3, 8), 3)),)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


def test_kernels_that_are_not_here_are_refused() -> None:
    with pytest.raises(InputError, match=r"kernels 'fast' cannot run here: .* have torch"):
        native.use("fast")


def test_one_pool_of_threads_serves_torch_and_the_library(built: None) -> None:
    """The library finds OpenMP's functions in the copy that torch brought: a second one would fight for the cores."""
    code = (
        "import torch; from gristmill.kernels import native; native.available(); "
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
