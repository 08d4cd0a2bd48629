"""Initial weights: each parameter's values depend only on the seed, its name and its place in the whole."""

import math
from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.model import init as initialization
from gristmill.model.init import TABLE, Part, initialization_of, whole

SHAPE = {
    "d_model": 64, "n_layers": 2, "n_heads": 4, "kv_n_heads": 2, "ffn_hidden_size": 48, "vocab_size": 500,
    "max_seq_len": 64, "moe_num_experts": 4, "moe_top_k": 2,
}  # fmt: skip


def make(seed: int = 0, **changes: object) -> Transformer:
    return init_weights(Transformer(ModelConfig(**{**SHAPE, **changes})), seed)  # type: ignore[arg-type]


class NoRandomNumbers(TorchDispatchMode):
    """Fails on every operation that draws random numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert torch.Tag.nondeterministic_seeded not in func.tags, f"{func} draws random numbers"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ffn", ["moe", "dense"])
def test_the_constructor_draws_no_random_numbers(ffn: str) -> None:
    cfg = ModelConfig(**{**SHAPE, "ffn": ffn, "qk_norm": True})  # type: ignore[arg-type]
    before = torch.get_rng_state()
    with NoRandomNumbers():
        Transformer(cfg)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(AssertionError, match="draws random numbers"), NoRandomNumbers():
        torch.nn.Embedding(3, 4)


def test_every_parameter_and_buffer_gets_the_values_that_the_table_names() -> None:
    models = [
        make(initializer_range=0.05, moe_router_bias=True, qk_norm=True),
        make(initializer_range=0.05, ffn="dense", norm="rms_norm"),
        make(initializer_range=0.05, tie_word_embeddings=True),
    ]
    names = []
    for model in models:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            names.append(name)
            values = tensor.detach().double().flatten()
            match initialization_of(name):
                case "ones":
                    assert "norm" in name
                    assert values.eq(1.0).all()
                case "zeros":
                    assert name.endswith("router_bias")
                    assert values.eq(0.0).all()
                case "normal":
                    sigma = 0.05 / math.sqrt(len(values))
                    assert abs(float(values.mean())) < 5 * sigma
                    assert float(values.std()) == pytest.approx(0.05, abs=5 * sigma)
                    # Tails and symmetry: the share beyond 2 standard deviations is 4.55%.
                    share = float((values.abs() > 0.1).double().mean())
                    assert share == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / len(values)))
    assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in TABLE)


def test_a_name_outside_of_the_table_is_an_error() -> None:
    with pytest.raises(AssertionError, match="gate must match exactly one pattern"):
        initialization_of("blocks.0.ffn.gate")


def test_values_depend_on_the_seed_and_the_name_and_on_no_other_parameter() -> None:
    model, deeper, other_seed = make(), make(n_layers=3, qk_norm=True, tie_word_embeddings=True), make(seed=1)
    twin = dict(deeper.named_parameters())
    for name, param in model.named_parameters():
        if name in twin:
            assert torch.equal(param, twin[name]), name
    normal = {name: p for name, p in model.named_parameters() if initialization_of(name) == "normal"}
    others = dict(other_seed.named_parameters())
    drawn = [*normal.values(), *(others[name] for name in normal)]
    matrices = [matrix for param in drawn for matrix in (param if param.ndim == 3 else [param])]
    assert len({matrix.flatten()[:16].sum().item() for matrix in matrices}) == len(matrices)


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    first = make()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = make()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("piece_numel", [1, 300, 2**18])
def test_a_part_has_the_values_of_the_whole_at_its_place(monkeypatch: pytest.MonkeyPatch, piece_numel: int) -> None:
    """Whatever the size of a piece is, and however a part overlaps the pieces."""
    monkeypatch.setattr(initialization, "PIECE_NUMEL", piece_numel)
    model = make()
    for starts, ends in (((0, 0), (500, 48)), ((1, 7), (3, 41)), ((3, 47), (4, 48)), ((2, 5), (2, 5))):
        part, cut = Transformer(model.cfg), partial(cut_from, starts=starts, ends=ends)
        with torch.no_grad():
            for param in part.parameters():
                param.fill_(7.0)
        init_weights(part, 0, cut)
        for (name, param), expected in zip(part.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(cut(param).tensor, cut(expected).tensor), name
            assert int((param == 7.0).sum()) == param.numel() - cut(param).tensor.numel(), name


def cut_from(tensor: Tensor, starts: tuple[int, int], ends: tuple[int, int]) -> Part:
    """Rows `starts[0]:ends[0]` of a matrix; those experts of a stack, and of each the rows `starts[1]:ends[1]`."""
    if tensor.ndim == 1:
        return whole(tensor)
    start = [*starts[: tensor.ndim - 1], 0]
    return Part(tensor[tuple(map(slice, start, ends[: tensor.ndim - 1]))], tensor.shape, start)


def test_at_most_one_piece_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with a few rows draws only the pieces that overlap them, and a piece is bounded."""
    sizes: list[int] = []
    draw = torch.Tensor.normal_

    def counted(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        sizes.append(tensor.numel())
        return draw(tensor, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    monkeypatch.setattr(initialization, "PIECE_NUMEL", 640)  # 10 rows of 64
    model = Transformer(ModelConfig(**SHAPE))  # type: ignore[arg-type]
    init_weights(model, 0, lambda tensor: Part(tensor[:1], tensor.shape, [0] * tensor.ndim))
    assert max(sizes) <= 640
    stacks = 2 * 3 * 5  # of one expert of 48 rows, 5 pieces
    assert len(sizes) == 2 + 2 * 3 + stacks


@pytest.mark.gpu
def test_a_gpu_gets_the_values_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("not run: there is no GPU")
    with torch.device("cuda"):
        on_gpu = init_weights(Transformer(ModelConfig(**SHAPE)), 0)  # type: ignore[arg-type]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu.parameters(), make().parameters(), strict=True))
