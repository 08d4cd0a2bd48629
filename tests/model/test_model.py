"""The model: counts, the balancing loss in MegaBlocks' form, packing, and the dense twin."""

import pytest
import torch

from gristmill.kernels.experts import experts_reference
from gristmill.model import ModelConfig, Routing, Transformer, init_weights, packed
from gristmill.model.counts import count_params, train_flops_per_token

SHAPE = {
    "d_model": 32, "n_layers": 2, "n_heads": 4, "kv_n_heads": 2, "ffn_hidden_size": 24, "vocab_size": 300,
    "max_seq_len": 64, "moe_num_experts": 4, "moe_top_k": 2,
}  # fmt: skip


def make(**changes: object) -> Transformer:
    return init_weights(Transformer(ModelConfig(**{**SHAPE, **changes})), seed=0)  # type: ignore[arg-type]


def test_dbrx_has_its_published_number_of_parameters() -> None:
    counts = count_params(ModelConfig(vocab_size=100352))
    assert round(counts.total_params / 1e9, 2) == 131.60
    assert round(counts.active_params / 1e9, 2) == 36.47


@pytest.mark.parametrize("ffn", ["moe", "dense"])
def test_counted_parameters_are_the_models_own(ffn: str) -> None:
    model = make(ffn=ffn)
    counts = count_params(model.cfg)
    assert counts.total_params == sum(param.numel() for param in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert counts.active_params == counts.total_params - experts // 2  # 2 of 4 experts


def test_flops_per_token_are_six_per_matrix_weight_and_the_attention() -> None:
    cfg = ModelConfig(**{**SHAPE, "ffn": "dense"})  # type: ignore[arg-type]
    weights = sum(p.numel() for name, p in make(ffn="dense").named_parameters() if "wte" not in name)
    forward_attention = 2 * (2 * 32 * 64 / 2) * 2  # layers x (scores and mix) x causal half x multiply-add
    assert train_flops_per_token(cfg, 64) == pytest.approx(6 * weights + 3 * forward_attention)


def test_a_balanced_router_has_exactly_the_weight_as_its_loss_and_a_collapsed_one_more() -> None:
    """MegaBlocks' definition: the mean over layers of w·E·Σ f·P, 0.05 when balanced at w = 0.05."""
    moe = make(moe_top_k=1).blocks[0].ffn
    x = torch.eye(32)[:4].repeat(8, 1)  # four kinds of token, one for each expert
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, :4] = torch.eye(4) * 30
    _, probs, counts = moe(x)
    assert counts.tolist() == [8, 8, 8, 8]
    assert float(Routing(1.0, probs[None], counts[None]).balance_loss().detach()) == pytest.approx(1.0)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0] = 30.0
    _, probs, counts = moe(x)
    assert float(Routing(1.0, probs[None], counts[None]).balance_loss().detach()) == pytest.approx(4.0)
    model = make(moe_loss_weight=0.05)
    for block in model.blocks:
        block.ffn.router.weight.data.zero_()  # uniform probabilities: balanced in P
    _, routing = model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None], packed(torch.zeros(1, 8)))
    assert float(routing.balance_loss().detach()) == pytest.approx(0.05)


def test_the_balancing_loss_reaches_the_router_and_nothing_else_of_its_layer() -> None:
    moe = make().blocks[0].ffn
    _, probs, counts = moe(torch.randn(20, 32))
    Routing(1.0, probs[None], counts[None]).balance_loss().backward()
    assert moe.router.weight.grad is not None
    assert moe.experts.w1.grad is None


def test_the_moe_layer_is_router_top_k_and_weighted_experts() -> None:
    moe = make().blocks[0].ffn
    x = torch.randn(30, 32)
    out, _, _ = moe(x)
    probs = (x @ moe.router.weight.T).softmax(-1)
    weights, ids = probs.topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = experts_reference(x, weights, ids, moe.experts.w1, moe.experts.v1, moe.experts.w2)
    assert torch.allclose(out, expected, atol=1e-6)


def test_packed_documents_get_the_hidden_states_that_they_get_alone() -> None:
    model = make(initializer_range=0.2).eval()
    tokens = torch.randint(0, 300, (1, 50))
    parts = [slice(0, 20), slice(20, 33), slice(33, 50)]
    documents = torch.cat([torch.full((p.stop - p.start,), i) for i, p in enumerate(parts)])[None]
    positions = torch.cat([torch.arange(p.stop - p.start) for p in parts])[None]
    together, _ = model(tokens, positions, packed(documents))
    for part in parts:
        length = part.stop - part.start
        alone, _ = model(tokens[:, part], torch.arange(length)[None], packed(torch.zeros(1, length)))
        assert torch.allclose(together[:, part], alone, atol=1e-4)


def test_jitter_changes_the_routers_input_in_training_only() -> None:
    model = make(moe_jitter_eps=0.5, initializer_range=0.2)
    inputs = (torch.arange(40)[None], torch.arange(40)[None], packed(torch.zeros(1, 40)))
    first, second = model(*inputs)[0], model(*inputs)[0]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 33}, "d_model=33 must be a multiple of n_heads=4"),
        ({"head_size": 0}, "head_size=0 must be even and at least 2"),
        ({"kv_n_heads": 3}, "kv_n_heads=3 must divide n_heads=4"),
        ({"moe_top_k": 5}, "moe_top_k=5 must be from 1 to moe_num_experts=4"),
        ({"clip_qkv": 0.0}, "clip_qkv=0.0 must be positive"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SHAPE, **change})  # type: ignore[arg-type]
