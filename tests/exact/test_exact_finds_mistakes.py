"""Would the comparison notice? Each mistake here, made on purpose, goes far beyond the bound.

Not among them, because they change nothing: positions that go on counting from one packed document to the next (rotary
attention sees distances alone), and a softmax over the chosen experts' logits where weights are normalised to 1.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import both
import pytest
import torch
import torch.nn.functional as F
from both import Both, Choices, clip_gap, distance, load_ours, routing_gap
from random_models import LAYOUTS, Case, Layout, packed_row
from test_exact_against_transformers import GRADIENT, LOGITS, our_gradients, their_gradients
from torch import Tensor

import gristmill.model.transformer as ours
from gristmill.kernels import native
from gristmill.kernels.experts import experts
from gristmill.kernels.norm import rms_norm
from gristmill.model import Attend, ModelConfig, Transformer, packed

DBRX = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    kv_n_heads=2,
    max_seq_len=64,
    vocab_size=100,
    rope_theta=500.0,
    clip_qkv=0.7,
    ffn_hidden_size=32,  # square, so that a transposed matrix fits
    moe_num_experts=4,
    moe_top_k=2,
    initializer_range=0.2,
)
QWEN = replace(DBRX, norm="rms_norm", qk_norm=True, clip_qkv=None, head_size=16, tie_word_embeddings=True)
CASES = {layout: Case(layout, 1, cfg, (20, 9, 5)) for layout, cfg in zip(LAYOUTS, (DBRX, QWEN), strict=True)}

Mistake = Callable[[Transformer, pytest.MonkeyPatch], object]


# ---- in the weights ------------------------------------------------------------------------------------


def reordered(name: str, *order: int) -> Mistake:
    """A tensor's rows, cut into as many blocks, stand in another order, in every layer."""

    def make(model: Transformer, patch: pytest.MonkeyPatch) -> None:
        for block in model.blocks:
            weight = block.get_parameter(name)
            blocks = weight.chunk(len(order))
            weight.copy_(torch.cat([blocks[i] for i in order]))

    return make


def swapped(one: str, other: str) -> Mistake:
    def make(model: Transformer, patch: pytest.MonkeyPatch) -> None:
        for block in model.blocks:
            a, b = block.get_parameter(one), block.get_parameter(other)
            a.data, b.data = b.data, a.data

    return make


def transposed_w2(model: Transformer, patch: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        block.ffn.experts.w2.copy_(block.ffn.experts.w2.transpose(1, 2).clone())


# ---- in the settings -----------------------------------------------------------------------------------


def built_with(**settings: Any) -> Mistake:
    def make(model: Transformer, patch: pytest.MonkeyPatch) -> None:
        model.cfg = replace(model.cfg, **settings)
        for part in model.modules():
            if isinstance(part, ours.Attention | ours.MoE):
                part.cfg = model.cfg
            elif isinstance(part, ours.LayerNorm):
                part.eps = model.cfg.norm_eps

    return make


def norms_of_kind(kind: type[ours.LayerNorm]) -> Mistake:
    def make(model: Transformer, patch: pytest.MonkeyPatch) -> None:
        for part in model.modules():
            if isinstance(part, ours.LayerNorm):
                part.__class__ = kind

    return make


# ---- in the code ---------------------------------------------------------------------------------------


def unturned(x: Tensor, cos: Tensor, sin: Tensor, turned: int | None = None, clip: float | None = None) -> Tensor:
    return x if clip is None else x.clamp(-clip, clip)


def turned_as_neighbours(
    x: Tensor, cos: Tensor, sin: Tensor, turned: int | None = None, clip: float | None = None
) -> Tensor:
    """The other rotary layout: elements 2c and 2c + 1 turn together."""
    x, values = unturned(x, cos, sin, turned, clip).split(
        (turned or x.shape[2], x.shape[2] - (turned or x.shape[2])), 2
    )
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), values], 2)


def rotated_by(rotate: Callable[..., Tensor]) -> Mistake:
    def after_norms(x: Tensor, q: Tensor, k: Tensor, eps: float, cos: Tensor, sin: Tensor, *heads: int) -> Any:
        parts = x.split((*heads, x.shape[2] - sum(heads)), dim=2)
        turned = (rotate(rms_norm(part, weight, eps), cos, sin) for part, weight in zip(parts, (q, k), strict=False))
        return *turned, parts[2]

    return lambda model, patch: [
        patch.setattr(ours, "rotate", rotate),
        patch.setattr(ours, "rotate_normed", after_norms),
    ]


def attention(*, clips: str = "qkv", clips_last: bool = False, norms_last: bool = False) -> Any:
    """`Attention.forward` with another order of its steps."""

    def forward(self: ours.Attention, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        cfg, (B, S, _D) = self.cfg, x.shape
        bound = cfg.clip_qkv or float("inf")
        sizes = (cfg.n_heads, cfg.kv_n_heads, cfg.kv_n_heads)
        parts = dict(zip("qkv", self.Wqkv(x).view(B, S, -1, cfg.head_dim).split(sizes, dim=2), strict=True))

        def clip() -> None:
            parts.update({name: parts[name].clamp(-bound, bound) for name in clips})

        def turn() -> None:
            parts.update({name: ours.rotate(parts[name], cos, sin) for name in "qk"})

        def norm() -> None:
            if cfg.qk_norm:
                parts.update(q=self.q_norm(parts["q"]), k=self.k_norm(parts["k"]))

        steps = [*([] if clips_last else [clip]), *([turn, norm] if norms_last else [norm, turn])]
        for step in [*steps, *([clip] if clips_last else [])]:
            step()
        return self.out_proj(attend(layer, parts["q"], parts["k"], parts["v"]).reshape(B, S, -1))

    return forward


def parallel_block(
    self: ours.Block, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend, observe: None
) -> Any:
    out, probs, counts = self.ffn(self.norm_2(x).flatten(0, 1))
    return x + self.attn(self.norm_1(x), layer, cos, sin, attend) + out.view_as(x), probs, counts


def post_norm_block(
    self: ours.Block, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend, observe: None
) -> Any:
    x = self.norm_1(x)
    x = self.norm_2(x + self.attn(x, layer, cos, sin, attend))
    out, probs, counts = self.ffn(x.flatten(0, 1))
    return x + out.view_as(x), probs, counts


def router_in_bf16(model: Transformer, patch: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        block.ffn.router.register_forward_hook(lambda module, given, out: out.bfloat16().float())


BOTH: dict[str, Mistake] = {
    "two experts swapped": lambda model, patch: [
        reordered(f"ffn.experts.{name}", 1, 0, 2, 3)(model, patch) for name in ("w1", "v1", "w2")
    ],
    "w1 of two experts swapped": reordered("ffn.experts.w1", 1, 0, 2, 3),
    "two rows of the router swapped": reordered("ffn.router.weight", 1, 0, 2, 3),
    "gate and up swapped": swapped("ffn.experts.w1", "ffn.experts.v1"),
    "w2 transposed": transposed_w2,
    "norm_1 and norm_2 swapped": swapped("norm_1.weight", "norm_2.weight"),
    "k and v swapped": reordered("attn.Wqkv.weight", 0, 1, 3, 2),  # of q, q, k, v
    "two query heads of different groups swapped": reordered("attn.Wqkv.weight", 0, 2, 1, 3, 4, 5, 6, 7),
    "theta of 10000": built_with(rope_theta=10000.0),
    "one expert less": built_with(moe_top_k=1),
    "one expert more": built_with(moe_top_k=3),
    "weights not normalised": built_with(moe_normalize_expert_weights=None),
    "weights normalised by their squares": built_with(moe_normalize_expert_weights=2.0),
    "eps 10 times as large": built_with(norm_eps=1e-4),
    "neighbours turn together": rotated_by(turned_as_neighbours),
    "no rotation": rotated_by(unturned),
    "attention and experts side by side": lambda model, patch: patch.setattr(ours.Block, "forward", parallel_block),
    "norms on the residual": lambda model, patch: patch.setattr(ours.Block, "forward", post_norm_block),
    "no last norm": lambda model, patch: setattr(model, "norm_f", torch.nn.Identity()),
    "router in bf16": router_in_bf16,
    "gelu": lambda model, patch: patch.setattr(F, "silu", F.gelu),
}
ONE: dict[Layout, dict[str, Mistake]] = {
    "dbrx": {
        "no clip": built_with(clip_qkv=None),
        "another clip": built_with(clip_qkv=0.71),
        "v not clipped": lambda model, patch: patch.setattr(ours.Attention, "forward", attention(clips="qk")),
        "clip after rotation": lambda model, patch: patch.setattr(
            ours.Attention, "forward", attention(clips_last=True)
        ),
        "RMS norms": norms_of_kind(ours.RMSNorm),
    },
    "qwen3_moe": {
        "a clip": built_with(clip_qkv=0.7),
        "layer norms": norms_of_kind(ours.LayerNorm),
        "q_norm and k_norm swapped": swapped("attn.q_norm.weight", "attn.k_norm.weight"),
        "heads not normed": built_with(qk_norm=False),
        "heads normed after rotation": lambda model, patch: patch.setattr(
            ours.Attention, "forward", attention(norms_last=True)
        ),
    },
}


def documents_leak(ids: Tensor) -> Attend:
    return packed(torch.zeros_like(ids))


def next_token_visible(ids: Tensor) -> Attend:
    S = ids.shape[1]
    visible = (ids[0, :, None] == ids[0]) & (torch.arange(S) <= torch.arange(S)[:, None] + 1)

    def attend(layer: int, *qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)

    return attend


def changed(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Callable[[Tensor], Attend]:
    """Right attention over changed queries, keys and values."""
    return lambda ids: lambda layer, q, k, v: packed(ids)(layer, *change(q, k, v))


ATTENDS: dict[str, Callable[[Tensor], Attend]] = {
    "documents leak into one another": documents_leak,
    "the next token is visible": next_token_visible,
    "scores without their scale": changed(lambda q, k, v: (q * q.shape[-1] ** 0.5, k, v)),
    "key heads dealt out in turn": changed(
        lambda q, k, v: (q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))  # head h reads h % 2 instead of h // 2
    ),
    "key heads exchanged": changed(lambda q, k, v: (q, k.flip(2), v)),
}


# ---- in the gradients alone ----------------------------------------------------------------------------


def clamp_lets_gradients_through(model: Transformer, patch: pytest.MonkeyPatch) -> None:
    clamp = Tensor.clamp
    patch.setattr(Tensor, "clamp", lambda x, low, high: x + (clamp(x, low, high) - x).detach())


def experts_computed_by(compute: Callable[..., Tensor]) -> Mistake:
    return lambda model, patch: [patch.setattr(block.ffn.experts, "compute", compute) for block in model.blocks]


def norm_without_gradient(model: Transformer, patch: pytest.MonkeyPatch) -> None:
    norm = Tensor.norm
    patch.setattr(Tensor, "norm", lambda x, **how: norm(x, **how).detach())


GRADIENTS: dict[str, Mistake] = {
    "router without gradient": experts_computed_by(lambda x, weights, *rest: experts(x, weights.detach(), *rest)),
    "normalisation without gradient": norm_without_gradient,
    "experts' input without gradient": experts_computed_by(lambda x, *rest: experts(x.detach(), *rest)),
}
GRADIENTS_ONE: dict[Layout, dict[str, Mistake]] = {
    "dbrx": {"clamp lets gradients through": clamp_lets_gradients_through},
    "qwen3_moe": {
        "embedding without the head's gradient": lambda model, patch: patch.setattr(
            Transformer, "output_weight", property(lambda self: self.wte.weight.detach())
        )
    },
}


@pytest.fixture(autouse=True)
def kernels_in_which_mistakes_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_in_use", "torch")


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(CASES[request.param], tmp_path_factory.mktemp("published"))


def error(pair: Both, model: Transformer, attention: Callable[[Tensor], Attend] = packed) -> float:
    tokens, positions, ids = packed_row(pair.documents)
    return distance(model.logits(model(tokens, positions, attention(ids))[0])[0], pair.wanted)


@torch.no_grad()
def test_each_mistake_moves_the_logits(pair: Both) -> None:
    for name, mistake in (BOTH | ONE[pair.case.layout]).items():
        model = load_ours(pair.folder)
        with pytest.MonkeyPatch.context() as patch:
            mistake(model, patch)
            assert error(pair, model) > 10 * LOGITS, name
    for name, attend in ATTENDS.items():
        assert error(pair, pair.ours, attend) > 10 * LOGITS, name


@torch.no_grad()
def test_without_their_mistake_the_altered_functions_are_right(pair: Both) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.Attention, "forward", attention())
        assert error(pair, pair.ours, changed(lambda q, k, v: (q, k, v))) <= LOGITS


def test_each_mistake_in_the_backward_pass_moves_a_gradient(pair: Both) -> None:
    _, wanted = their_gradients(pair)
    for name, mistake in (GRADIENTS | GRADIENTS_ONE[pair.case.layout]).items():
        model = load_ours(pair.folder)
        with pytest.MonkeyPatch.context() as patch:
            mistake(model, patch)
            _loss, given = our_gradients(model, pair.documents)
        zeros = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
        given = {key: zeros[key] if tensor is None else tensor for key, tensor in given.items()}
        assert max(distance(given[key], wanted[key]) for key in wanted) > 10 * GRADIENT, name


def test_a_near_tie_is_told_from_a_wrong_choice() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.3 - 1e-6, 0.0], [0.4, 0.3, 0.2, 0.1]])
    near, wrong = probs[:, [0, 2, 1, 3]].clone(), probs[:, [0, 1, 3, 2]].clone()
    near[1] = probs[1]
    assert routing_gap(Choices([], [probs], []), Choices([], [probs], []), 2) is None
    assert routing_gap(Choices([], [near], []), Choices([], [probs], []), 2) == pytest.approx(1e-6, rel=0.1)
    assert routing_gap(Choices([], [wrong], []), Choices([], [probs], []), 3) == pytest.approx(0.3, rel=0.1)
    qkv = torch.tensor([[0.7 - 1e-4, 0.5]])
    assert clip_gap(Choices([], [], [qkv + 2e-4]), Choices([], [], [qkv]), 0.7) == pytest.approx(1e-4 / 0.7, rel=0.01)
    assert clip_gap(Choices([], [], [qkv + 0.3]), Choices([], [], [qkv]), 0.7) == pytest.approx(0.2 / 0.7)


def test_tokens_at_a_near_tie_are_drawn_again_and_counted_and_wrong_choices_are_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case, gaps = CASES["dbrx"], [1e-7, None, 0.1]
    monkeypatch.setattr(both, "counts", Counter())
    monkeypatch.setattr(both, "routing_gap", lambda ours, theirs, top_k: gaps.pop(0))
    assert Both(case, tmp_path).documents == case.tokens(1) != case.tokens(0)
    assert both.counts["routing ties"] == 1
    with pytest.raises(AssertionError, match=r"probabilities are 0\.1 apart"):
        Both(case, tmp_path)
