"""Packed and quantized matrices, in each instruction set that this machine runs, against references and alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.errors import InputError
from gristmill.kernels import native, packed
from gristmill.kernels.attention import packed_attention
from gristmill.kernels.experts import experts_reference
from gristmill.kernels.packed import Kind, Packed, PackedExperts, experts, pack, pack_experts, product
from gristmill.kernels.quantized import Quantized, quantize

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}
KINDS: dict[Kind, int] = {"f32": 0, "bf16": 0, "int8": 8, "int4": 4}
in_every_way = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def packs(kernels: str) -> None:
    if kernels == "torch":
        pytest.skip("packed matrices are the native kernels' own")


def near(given: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert float((given.double() - wanted.double()).abs().max()) <= tolerance * float(wanted.abs().max())


def drawn(kind: Kind, *shape: int) -> tuple[Tensor | Quantized, Tensor]:
    """A matrix as it is packed, and the numbers that it stands for."""
    matrix = torch.randn(*shape) * 0.1
    if bits := KINDS[kind]:
        made = quantize(matrix, bits, 32)
        return made, made.dense()
    typed = matrix.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    return typed, typed.float()


def row_type(kind: Kind, also: torch.dtype) -> torch.dtype:
    """`also`: what multiplies whole numbers, which take both."""
    return {"f32": torch.float32, "bf16": torch.bfloat16}.get(kind, also)


@in_every_way
@given(
    kind=st.sampled_from(list(KINDS)), rows=st.integers(1, 120), outputs=st.integers(1, 200), groups=st.integers(1, 5),
    dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_product_is_the_references_and_a_row_has_the_same_bits_alone(
    packs: None, kind: Kind, rows: int, outputs: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    matrix, dense = drawn(kind, outputs, 32 * groups if KINDS[kind] else 30 * groups)
    x = torch.randn(rows, dense.shape[1]).to(row_type(kind, dtype))
    made = product(x, pack(matrix))
    near(made, x.double() @ dense.double().T, TOLERANCE[x.dtype] if not KINDS[kind] else 0.01)
    for row in range(0, rows, 7):
        assert torch.equal(product(x[row : row + 1].clone(), pack(matrix))[0], made[row])


@in_every_way
@given(
    kind=st.sampled_from(list(KINDS)), tokens=st.integers(1, 90), E=st.integers(1, 6), widths=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 99),
)  # fmt: skip
def test_experts_are_the_references_and_a_token_has_the_same_bits_alone(
    packs: None, kind: Kind, tokens: int, E: int, widths: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    D, F = (64, 32 * widths) if KINDS[kind] else (50, 33 * widths)
    (w1, one), (v1, two) = drawn(kind, E, F, D), drawn(kind, E, F, D)
    w2, three = drawn(kind, E, D, F)  # transposed, as only a quantized one is packed
    made = pack_experts(w1, v1, w2 if isinstance(w2, Quantized) else w2.mT)
    x = torch.randn(tokens, D).to(row_type(kind, dtype))
    weights, ids = torch.rand(tokens, E).softmax(-1).topk(min(E, 2))
    wanted = experts_reference(x.double(), weights.double(), ids, one.double(), two.double(), three.double().mT)
    together = experts(x, weights, ids, made)
    near(together, wanted, TOLERANCE[torch.float32] if x.dtype == torch.float32 and not KINDS[kind] else 0.02)
    for token in range(0, tokens, 7):
        alone = slice(token, token + 1)
        assert torch.equal(experts(x[alone].clone(), weights[alone], ids[alone], made)[0], together[token])


def test_an_expert_may_lie_in_any_block_and_one_that_nobody_chose_in_none(packs: None) -> None:
    torch.manual_seed(0)
    made = pack_experts(*(torch.randn(4, 40, 64) for _ in range(3)))
    x, weights, ids = torch.randn(9, 64), torch.rand(9, 2), torch.randint(1, 4, (9, 2))
    moved = PackedExperts(made.blocks[[3, 1, 2]], torch.tensor([2**40, 1, 2, 0]), made.kind, made.F, made.group)
    assert torch.equal(experts(x, weights, ids, moved), experts(x, weights, ids, made))


@pytest.fixture
def shortens(packs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instruction sets for which it does not pay take 12 bits, too."""
    monkeypatch.setattr(packed, "SHORTENING", native.ISAS)


@pytest.fixture
def no_tiles(kernels: str, shortens: None) -> None:
    if "amx" in kernels.lower():
        pytest.skip("tiles add in an order of their own; with AMX nothing is shortened")


def weights_like(name: str, N: int, K: int) -> Tensor:
    """bf16 [N, K] of all that fits in 12 bits."""
    drawn = torch.randn(N, K) * 0.02
    few = torch.rand(N, K) < 0.001
    match name:
        case "heavy tails":
            drawn = torch.distributions.StudentT(3.0).sample((N, K)) * 0.02
        case "zeros":
            drawn[torch.rand(N, K) < 0.5] = 0
        case "negative zeros":
            drawn[few] = -0.0
        case "subnormal":
            drawn = drawn * 2.0**-122
        case "not finite":
            drawn[few] = torch.tensor([float("inf"), float("-inf"), float("nan")])[torch.randint(3, (int(few.sum()),))]
        case "constant":
            drawn = torch.full((N, K), -3.0)
        case "transposed":
            drawn = drawn.T.contiguous().T
    return drawn.bfloat16()


LIKE = ("normal", "heavy tails", "zeros", "negative zeros", "subnormal", "not finite", "constant", "transposed")


def unpacked(matrix: Packed) -> Tensor:
    """What native/halves.h says, weight by weight: int16 [N, K]."""
    inputs, made = -(-matrix.K // 32) * 32, []
    room = -(-inputs // 64) * 16
    for panel in matrix.data.view(-(-matrix.N // 64), -1):
        steps, bits = panel[128 + 4 * room :].view(-1, 192).int(), torch.empty(inputs // 2, 128, dtype=torch.int32)
        for weight in range(128):
            place = weight // 64 * 64 + weight % 32 // 8 * 16 + weight % 64 // 32 * 8 + weight % 8
            codes = steps[:, 128 + place % 64] >> place // 64 * 4 & 15
            bits[:, weight] = steps[:, place] | panel[codes.long()].int() << 8
        for listed in panel[128:].view(torch.int32)[: int(panel[64:72].view(torch.int64))].tolist():
            bits[listed >> 15, listed >> 8 & 127] &= 255
            bits[listed >> 15, listed >> 8 & 127] |= (listed & 255) << 8
        made.append(bits.view(-1, 64, 2).transpose(0, 1).flatten(1))
    return torch.cat(made)[: matrix.N, : matrix.K].to(torch.int16)


@in_every_way
@given(like=st.sampled_from(LIKE), N=st.integers(1, 150), K=st.integers(1, 300), seed=st.integers(0, 99))
def test_weights_in_12_bits_keep_every_bit(shortens: None, like: str, N: int, K: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = weights_like(like, N, K)
    made = pack(weight)
    assert made.kind == "bf16_12"
    assert torch.equal(unpacked(made), weight.view(torch.int16))
    assert made.data.numel() < 0.8 * pack(weight, shorten=False).data.numel()


@in_every_way
@given(
    like=st.sampled_from(LIKE), rows=st.integers(1, 60), N=st.integers(1, 150), K=st.integers(1, 1100),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_product_with_12_bits_has_the_bits_of_one_with_16(
    no_tiles: None, like: str, rows: int, N: int, K: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = weights_like(like, N, K), torch.randn(rows, K).bfloat16()
    short, plain = pack(weight), pack(weight, shorten=False)
    assert (short.kind, plain.kind) == ("bf16_12", "bf16")
    made = product(x, short)
    assert torch.equal(made.view(torch.int16), product(x, plain).view(torch.int16))
    for row in range(0, rows, 7):
        assert torch.equal(product(x[row : row + 1].clone(), short)[0].view(torch.int16), made[row].view(torch.int16))


def test_experts_with_12_bits_have_the_bits_of_those_with_16(no_tiles: None) -> None:
    torch.manual_seed(0)
    matrices = [torch.stack([weights_like("heavy tails", 150, 130) for _ in range(3)]) for _ in range(2)]
    matrices.append(torch.stack([weights_like("normal", 150, 130) for _ in range(3)]))
    short, plain = pack_experts(*matrices), pack_experts(*matrices, shorten=False)
    assert (short.kind, plain.kind) == ("bf16_12", "bf16")
    for tokens in (1, 5, 70):
        x, weights, ids = torch.randn(tokens, 130).bfloat16(), torch.rand(tokens, 2), torch.randint(3, (tokens, 2))
        assert torch.equal(experts(x, weights, ids, short), experts(x, weights, ids, plain))


def test_what_does_not_fit_in_12_bits_keeps_its_16_and_so_do_the_experts_beside_it(shortens: None) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-(2**15), 0x7F00, (70, 256)).to(torch.int16)
    assert pack(weight.view(torch.bfloat16)).kind == "bf16"
    matrices = [torch.randn(3, 80, 64).bfloat16() for _ in range(3)]
    assert pack_experts(*matrices).kind == "bf16_12"
    matrices[1][2] *= 2.0 ** torch.randint(-60, 60, (80, 64))
    made = pack_experts(*matrices)
    assert made.kind == "bf16"
    assert torch.equal(made.blocks, pack_experts(*matrices, shorten=False).blocks)


@in_every_way
@given(
    S=st.integers(1, 150), G=st.integers(1, 2), R=st.integers(1, 9), C=st.integers(1, 40),
    B=st.sampled_from((2, 16, 64)), dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_over_scattered_blocks_has_trainings_own_bits_however_a_sequence_is_cut(
    packs: None, S: int, G: int, R: int, C: int, B: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(S, heads, 2 * C).to(dtype) for heads in (G * R, G, G))
    wanted = packed_attention(q[None], k[None], v[None], torch.zeros(1, S, dtype=torch.long))[0]
    num_blocks = -(-S // B) + 3
    caches = torch.full((2, num_blocks, G, -(-2 * C // 32) * 32 * B), float("nan"), dtype=dtype)  # what others left
    blocks, cuts = torch.randperm(num_blocks), [0, *sorted(torch.randint(S + 1, (3,)).tolist()), S]
    for start, end in pairwise(cuts):
        position = torch.arange(start, end)
        where = blocks[position // B] * B + position % B, torch.tensor([[0, end - start, start, 0]]), blocks
        part = slice(start, end)
        made = torch.ops.gristmill.paged_attention(q[part], k[part], v[part], caches[0], caches[1], *where)
        assert torch.equal(made, wanted[part])


def test_a_quantized_matrix_is_as_near_as_its_codes_can_be() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(7, 3, 128) * torch.rand(7, 3, 1).exp()
    for bits, most in ((8, 0.007), (4, 0.11)):
        made = quantize(matrix, bits, 64)
        near_, top = made.dense(), 2 ** (bits - 1)
        assert -top <= int(made.codes.min()) < int(made.codes.max()) < top
        assert float((near_ - matrix).norm() / matrix.norm()) < most
        step = made.scales.float().repeat_interleave(64, -1).abs()
        inside = (made.codes.int() > -top) & (made.codes.int() < top - 1)
        assert bool(((near_ - matrix).abs() <= 0.501 * step)[inside].all())
    assert torch.equal(quantize(torch.zeros(2, 32), 4, 32).dense(), torch.zeros(2, 32))


@pytest.mark.parametrize(("bits", "group", "wrong"), [(3, 32, "bits=3"), (4, 48, "group=48"), (4, 64, "divide the 96")])
def test_what_cannot_be_quantized_is_refused(bits: int, group: int, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        quantize(torch.randn(4, 96), bits, group)


def test_the_operators_know_their_shapes_without_computing(built: None) -> None:
    operators, x = torch.ops.gristmill, torch.randn(3, 64)
    matrix, made = pack(torch.randn(5, 64)), pack_experts(*(torch.randn(2, 40, 64) for _ in range(3)))
    q, k, caches = torch.randn(3, 4, 32), torch.randn(3, 2, 32), torch.zeros(2, 4, 2, 32 * 16)
    where = torch.arange(3), torch.tensor([[0, 3, 0, 0]]), torch.tensor([0])
    weights, ids = torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.long)
    cases = [
        (operators.lay_panels, (torch.randn(2, 64, 3),)),
        (operators.product, (x, matrix.data, 0, 5, 0)),
        (operators.packed_experts, (x, weights, ids, made.blocks, made.slots, 0, 40, 0)),
        (operators.paged_attention, (q, k, k, caches[0], caches[1], *where)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
