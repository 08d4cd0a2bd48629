"""Counted by arithmetic, compared with models that exist: on the meta device, under torch's own operation counter."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gristmill.inference.runner import Runner
from gristmill.kernels import native
from gristmill.model import ModelConfig, Transformer, init_weights, packed
from gristmill.model.counts import (
    TRAINING_BYTES,
    count_params,
    count_parts,
    kv_bytes_per_token,
    train_flops_per_token,
)
from gristmill.train.config import OptimizerConfig
from gristmill.train.optimizer import Optimizer

SHAPE = {
    "d_model": 48, "n_layers": 2, "n_heads": 4, "kv_n_heads": 2, "ffn_hidden_size": 24, "vocab_size": 300,
    "max_seq_len": 64, "moe_num_experts": 4, "moe_top_k": 2,
}  # fmt: skip
QWEN = {"head_size": 16, "norm": "rms_norm", "qk_norm": True, "clip_qkv": None}


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    kv_n_heads, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    n_heads = kv_n_heads * draw(st.integers(1, 3))
    head_size = draw(st.none() | st.sampled_from([2, 6, 8]))
    return ModelConfig(
        d_model=draw(st.integers(1, 40)) if head_size else n_heads * draw(st.sampled_from([2, 4, 10])),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        kv_n_heads=kv_n_heads,
        head_size=head_size,
        vocab_size=draw(st.integers(1, 90)),
        norm=draw(st.sampled_from(["layer_norm", "rms_norm"])),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        ffn=draw(st.sampled_from(["moe", "dense"])),
        ffn_hidden_size=draw(st.integers(1, 30)),
        moe_num_experts=num_experts,
        moe_top_k=draw(st.integers(1, num_experts)),
    )


@given(shapes())
def test_counted_parameters_are_those_of_the_model_part_by_part(cfg: ModelConfig) -> None:
    with torch.device("meta"):
        sizes = {name: param.numel() for name, param in Transformer(cfg).named_parameters()}
    counts = count_params(cfg)
    assert counts.total_params == sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    unused = experts // cfg.moe_num_experts * (cfg.moe_num_experts - cfg.moe_top_k)
    assert counts.active_params == counts.total_params - unused
    marks = {
        "embedding": ["wte."], "output": ["lm_head."], "router": [".router."], "experts": [".experts."],
        "norms": ["norm"], "attention": ["Wqkv", "out_proj"], "dense": ["ffn.w", "ffn.v"],
    }  # fmt: skip
    for part in count_parts(cfg, 64):
        found = [size for name, size in sizes.items() if any(mark in name for mark in marks.get(part.name, []))]
        assert part.total_params == sum(found), part.name


@pytest.mark.parametrize(
    "changes",
    [{}, {"moe_num_experts": 16, "moe_top_k": 4}, {"ffn": "dense"}, QWEN, {**QWEN, "tie_word_embeddings": True}],
)
def test_forward_operations_are_those_that_torch_counts(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts matrix products, and sees neither norms nor other element-wise work.

    Two things are computed beyond what a token needs, and are taken out of the comparison: attention multiplies the
    whole square of a short sequence and masks half of it, and the experts' rows are padded to tiles (here: of one).
    """
    monkeypatch.setattr(importlib.import_module("gristmill.kernels.experts"), "tile_rows", lambda *_: 1)
    monkeypatch.setattr(native, "_in_use", "torch")  # it sees into PyTorch's products only
    model = init_weights(Transformer(ModelConfig(**{**SHAPE, **changes})), seed=0)  # type: ignore[arg-type]
    tokens = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden, _ = model(tokens, torch.arange(40).expand(3, -1), packed(torch.zeros(3, 40)))
        model.logits(hidden)
    seen = {part.name: part.forward_flops for part in count_parts(model.cfg, 40)}
    seen.pop("norms")
    seen["attention scores"] *= 2
    assert counter.get_total_flops() == tokens.numel() * sum(seen.values())


def test_training_takes_six_operations_a_used_weight_and_attention() -> None:
    """The figure that runs have recorded: 6 x (active - embedding) + 6 x layers x d_model x length."""
    for changes in ({}, {"ffn": "dense"}):
        cfg = ModelConfig(**{**SHAPE, **changes})  # type: ignore[arg-type]
        matrices = count_params(cfg).active_params - 300 * 48
        assert train_flops_per_token(cfg, 64) == 6.0 * matrices + 6.0 * 2 * 48 * 64


def test_a_cached_token_holds_what_is_counted() -> None:
    cfg = ModelConfig(**{**SHAPE, **QWEN, "head_size": 32})  # type: ignore[arg-type]
    for dtype in (torch.bfloat16, torch.float32):
        runner = Runner(Transformer(cfg, dtype), num_blocks=5, block_tokens=16)
        assert runner.paged.nbytes == 80 * kv_bytes_per_token(cfg, dtype.itemsize)


def test_a_checkpoint_of_training_holds_what_is_counted() -> None:
    model = init_weights(Transformer(ModelConfig(**SHAPE)), seed=0)  # type: ignore[arg-type]
    state = Optimizer(OptimizerConfig(name="adamw"), model).state()
    tensors = [*model.parameters(), *(tensor for name, tensor in state.items() if not name.startswith("count/"))]
    assert sum(t.nbytes for t in tensors) == TRAINING_BYTES * count_params(model.cfg).total_params
