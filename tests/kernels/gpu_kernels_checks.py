"""The GPU kernels against float64 references, run by test_gpu_kernels.py in a process of its own.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu_kernels_checks.py      in Triton's interpreter, on the CPU
    python -m pytest tests/kernels/gpu_kernels_checks.py                         on a GPU

The interpreter cuts fp32 to bf16 where hardware rounds to nearest, so bf16 is allowed twice its rounding.
"""

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gristmill.kernels.attention import document_starts, packed_attention_reference
from gristmill.kernels.experts import experts_reference
from gristmill.kernels.gpu.experts import experts
from gristmill.kernels.gpu.loss import loss_and_gradient
from gristmill.kernels.gpu.rotary import rotate

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
DTYPES = [torch.float32, torch.bfloat16]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, in float64 on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out))
    return [x.detach().cpu().double() for x in (out, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def assert_near(ours: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-6)


def moe_inputs(T: int, E: int, K: int, F_: int, D: int, skew: float, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Tokens in `dtype` with fp32 weights beside them; a large skew sends most tokens to the first experts."""
    weights, ids = (torch.randn(T, E) - skew * torch.arange(E)).softmax(-1).topk(K, dim=-1)
    masters = [torch.randn(E, F_, D).to(dtype).float() for _ in range(3)]
    inputs = [torch.randn(T, D).to(dtype), weights, *masters]
    return [x.to(DEVICE) for x in inputs], ids.to(DEVICE)


def check_experts(T: int, E: int, K: int, F_: int, D: int, skew: float, dtype: torch.dtype) -> None:
    inputs, ids = moe_inputs(T, E, K, F_, D, skew, dtype)
    ours = gradients(lambda x, w, *masters: experts(x, w, ids, *masters), inputs)
    plain = [x.cpu().double() for x in inputs]
    exact = gradients(lambda x, w, *masters: experts_reference(x, w, ids.cpu(), *masters), plain)
    assert_near(ours, exact, TOLERANCE[dtype])


@settings(max_examples=4)
@example(T=1, E=5, K=2, F_=3, D=1, skew=0.0, dtype=torch.float32)  # one token, narrower than any block
@example(T=40, E=4, K=4, F_=24, D=16, skew=0.0, dtype=torch.bfloat16)  # every expert; torch's grouped GEMM
@example(T=40, E=6, K=1, F_=24, D=16, skew=50.0, dtype=torch.bfloat16)  # all on one expert, five empty
@example(T=40, E=6, K=1, F_=23, D=13, skew=50.0, dtype=torch.bfloat16)  # the same; Triton's
@example(T=140, E=2, K=1, F_=9, D=5, skew=0.0, dtype=torch.float32)  # tiles of 64
@example(T=3, E=1, K=1, F_=520, D=1030, skew=0.0, dtype=torch.float32)  # wider than every block
@given(
    T=st.integers(1, 40), E=st.integers(1, 9), K=st.integers(1, 9), F_=st.integers(1, 40), D=st.integers(1, 40),
    skew=st.sampled_from([0.0, 0.5, 50.0]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_experts_match_the_reference(T: int, E: int, K: int, F_: int, D: int, skew: float, dtype: torch.dtype) -> None:
    torch.manual_seed(T)
    check_experts(T, E, min(K, E), F_, D, skew, dtype)


def test_large_tiles_match_the_reference() -> None:
    torch.manual_seed(0)
    check_experts(520, 1, 1, 24, 24, 0.0, torch.float32)


class NoLook(TorchDispatchMode):
    """Fails where the host would wait for values that the device holds, or where a shape follows from them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        looks = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal")
        assert not func.__name__.split(".")[0].startswith(looks), func
        return func(*args, **(kwargs or {}))


def test_the_host_never_reads_the_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, ids = moe_inputs(50, 4, 2, 16, 16, 1.0, torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in inputs]
    if DEVICE == "cuda":
        experts(leaves[0], leaves[1], ids, *leaves[2:]).sum().backward()  # compiles: that may wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        # The interpreter's own copies are hidden from the mode: only kernels make them.
        with NoLook() if DEVICE == "cpu" else nullcontext():
            experts(leaves[0], leaves[1], ids, *leaves[2:]).sum().backward()
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_masters_get_fp32_gradients_twice_the_same_bits() -> None:
    inputs, ids = moe_inputs(60, 4, 2, 24, 16, 0.5, torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = experts(leaves[0], leaves[1], ids, *leaves[2:])
    torch.manual_seed(1)
    grad = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert [x.dtype for x in first] == [torch.bfloat16, *[torch.float32] * 4]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(out, experts(*inputs[:2], ids, *inputs[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 17, 4096, 4097, 100352])
def test_loss_and_gradient_match_float64_in_the_logits_place(V: int, dtype: torch.dtype) -> None:
    torch.manual_seed(V)
    logits = (torch.randn(5, V) * 5).to(dtype)
    logits[1] -= 300.0
    logits[2, V // 2] = 80.0  # all others vanish beside it
    targets = torch.randint(0, V, (5,))
    targets[2] = V // 2
    exact = logits.double().requires_grad_()
    exact_nll = F.cross_entropy(exact, targets, reduction="none")
    exact_nll.sum().backward()
    given_ = logits.to(DEVICE)
    nll, grad = loss_and_gradient(given_, targets.to(DEVICE))
    assert nll.dtype == torch.float32
    assert (grad.dtype, grad.data_ptr()) == (dtype, given_.data_ptr())
    assert_near([nll.cpu().double()], [exact_nll.detach()], 1e-5)  # fp32 whatever the logits are
    assert exact.grad is not None
    assert_near([grad.cpu().double()], [exact.grad], TOLERANCE[dtype])


@settings(max_examples=10)
@given(
    S=st.integers(1, 4), N=st.integers(1, 5), kept=st.integers(0, 2), half=st.integers(1, 20),
    clip=st.sampled_from([None, 0.5]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_rotation_is_a_complex_product_after_the_clamp(
    S: int, N: int, kept: int, half: int, clip: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(S)
    wide = torch.randn(2, S, N + 2, 2 * half).to(dtype)  # heads are a slice of a projection, as in the model
    angles = torch.randn(2, S, 1, half) * 10
    cos, sin = angles.cos(), angles.sin()
    turned = max(N - kept, 0)

    def exact(x: Tensor) -> Tensor:
        x = x[:, :, 1 : N + 1].clamp(-(clip or 1e9), clip or 1e9)
        pairs = torch.complex(*x[:, :, :turned].chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())
        return torch.cat([torch.cat([pairs.real, pairs.imag], dim=-1), x[:, :, turned:]], dim=2)

    def ours(x: Tensor) -> Tensor:
        return rotate(x[:, :, 1 : N + 1], cos.to(DEVICE), sin.to(DEVICE), turned, clip)

    assert_near(gradients(ours, [wide.to(DEVICE)]), gradients(exact, [wide.double()]), TOLERANCE[dtype])


def test_clipping_leaves_nan_to_be_seen() -> None:
    nan, one = torch.full((1, 1, 1, 2), float("nan"), device=DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE)
    assert rotate(nan, one, one, 1, 8.0).isnan().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="not run: torch has FlashAttention for GPUs alone")
def test_packed_attention_matches_the_masked_reference() -> None:
    attention = importlib.import_module("gristmill.kernels.gpu.attention")
    torch.manual_seed(0)
    starts = document_starts((torch.rand(3, 700) < 0.02).cumsum(1))
    inputs = [torch.randn(3, 700, heads, 64).bfloat16() for heads in (6, 2, 2)]
    there = starts.to(DEVICE)
    ours = gradients(lambda q, k, v: attention.packed_attention(q, k, v, there), [x.to(DEVICE) for x in inputs])
    exact = gradients(lambda *qkv: packed_attention_reference(*qkv, starts), [x.double() for x in inputs])
    assert_near(ours, exact, TOLERANCE[torch.bfloat16])
