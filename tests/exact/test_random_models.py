"""The random models are what the comparison promises: every corner of both layouts among the first hundred."""

import pytest
from random_models import LAYOUTS, LONGEST, Layout, draw

from gristmill.kernels.attention import TILE_QUERIES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hundred_models_reach_every_corner(layout: Layout) -> None:
    cases = [draw(layout, seed) for seed in range(100)]
    shapes = [case.cfg for case in cases]
    assert cases == [draw(layout, seed) for seed in range(100)]
    assert {1, 16} <= {cfg.moe_num_experts for cfg in shapes}
    assert any(cfg.moe_top_k == 1 < cfg.moe_num_experts for cfg in shapes)
    assert any(1 < cfg.moe_top_k == cfg.moe_num_experts for cfg in shapes)
    assert any(cfg.kv_n_heads == 1 < cfg.n_heads for cfg in shapes)
    assert any(1 < cfg.kv_n_heads < cfg.n_heads for cfg in shapes)
    assert any(1 < cfg.kv_n_heads == cfg.n_heads for cfg in shapes)
    assert {10000.0, 500000.0} < {cfg.rope_theta for cfg in shapes}
    lengths = [case.lengths for case in cases]
    assert any(len(set(documents)) > 2 and 1 in documents for documents in lengths)
    assert TILE_QUERIES < max(map(max, lengths)) <= LONGEST
    norms, clips = {cfg.moe_normalize_expert_weights for cfg in shapes}, {cfg.clip_qkv for cfg in shapes}
    if layout == "dbrx":
        assert norms == {None, 1.0, 2.0}
        assert {None, 0.25, 8.0} <= clips
    else:
        assert norms == {None, 1.0}
        assert any(cfg.n_heads * cfg.head_dim < cfg.d_model for cfg in shapes)
        assert any(cfg.n_heads * cfg.head_dim > cfg.d_model for cfg in shapes)
        assert {cfg.tie_word_embeddings for cfg in shapes} == {True, False}
