"""Parameters and floating-point operations of a shape, by arithmetic alone."""

from dataclasses import dataclass

from gristmill.model.config import ModelConfig


@dataclass(frozen=True)
class Counts:
    """`active_params`: those that a token meets (top-k experts; the embedding table is looked up, and counted)."""

    total_params: int
    active_params: int


def count_params(cfg: ModelConfig) -> Counts:
    assert cfg.vocab_size is not None
    D, kv_width = cfg.d_model, cfg.kv_n_heads * cfg.head_dim
    attention = D * (D + 2 * kv_width) + D * D
    expert = 3 * cfg.ffn_hidden_size * D
    match cfg.ffn:
        case "moe":
            total_ffn, active_ffn = cfg.moe_num_experts * (expert + D), cfg.moe_top_k * expert + cfg.moe_num_experts * D
        case "dense":
            total_ffn = active_ffn = expert
    outside = 2 * cfg.vocab_size * D + D
    shared = attention + 2 * D
    return Counts(
        total_params=outside + cfg.n_layers * (shared + total_ffn),
        active_params=outside + cfg.n_layers * (shared + active_ffn),
    )


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Forward and backward of one token: 6 per active matrix parameter, plus causal attention's two products.

    After Kaplan et al., 2020 (arXiv:2001.08361), without the embedding look-up; recomputation is not counted.
    """
    assert cfg.vocab_size is not None
    matrices = count_params(cfg).active_params - cfg.vocab_size * cfg.d_model
    return 6.0 * matrices + 6.0 * cfg.n_layers * cfg.d_model * seq_len
