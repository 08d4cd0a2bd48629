"""Parameters, floating-point operations and bytes of a shape, part by part, by arithmetic alone.

An operation is a multiplication or an addition: a product with a matrix takes two for each of its weights.
"""

from dataclasses import dataclass

from gristmill.model.config import ModelConfig

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
TRAINING_BYTES = 12  # a parameter in a checkpoint of training: the fp32 weight and AdamW's two fp32 moments


@dataclass(frozen=True)
class Counts:
    """`active_params`: those that a token meets (top-k experts; the embedding table is looked up, and counted)."""

    total_params: int
    active_params: int


@dataclass(frozen=True, kw_only=True)
class Part(Counts):
    """One kind of layer, over all blocks. `forward_flops`: of one token."""

    name: str
    forward_flops: int


def count_parts(cfg: ModelConfig, context: int) -> list[Part]:
    """What the model is made of. Its numbers add up: parameters to the model's, operations to one token's forward pass.

    context: tokens of a sequence; a token attends to half of them, the mean under a causal mask. Not counted, as usual
    (Kaplan et al., 2020, arXiv:2001.08361): softmax, activations, rotation, and the look-up in the embedding table.
    """
    assert cfg.vocab_size is not None
    D, L, V = cfg.d_model, cfg.n_layers, cfg.vocab_size
    q_width, kv_width = cfg.n_heads * cfg.head_dim, cfg.kv_n_heads * cfg.head_dim
    normed = (2 * L + 1) * D  # elements, each with a weight of its own
    qk_normed = L * (q_width + kv_width) if cfg.qk_norm else 0  # elements; the heads share their weights
    table = V * D
    return [
        _part("embedding", table, uses=0),
        _part("attention", L * D * (2 * q_width + 2 * kv_width)),
        _part("attention scores", 0, uses=L * q_width * context),  # two products over context / 2 keys
        *_ffn(cfg),
        _part("norms", normed + (2 * L * cfg.head_dim if cfg.qk_norm else 0), uses=normed + qk_normed),
        _part("output", 0 if cfg.tie_word_embeddings else table, uses=table),
    ]


def _ffn(cfg: ModelConfig) -> list[Part]:
    E, L, glu = cfg.moe_num_experts, cfg.n_layers, 3 * cfg.ffn_hidden_size * cfg.d_model
    match cfg.ffn:
        case "moe":
            experts = _part("experts", L * E * glu, active=L * cfg.moe_top_k * glu)
            return [_part("router", L * E * cfg.d_model), experts]
        case "dense":
            return [_part("dense", L * glu)]


def _part(name: str, total: int, active: int | None = None, uses: int | None = None) -> Part:
    """`uses`: products of a weight (or a key or value) with an activation for one token; None is one a weight."""
    active = total if active is None else active
    flops = 2 * (active if uses is None else uses)
    return Part(name=name, total_params=total, active_params=active, forward_flops=flops)


def count_params(cfg: ModelConfig) -> Counts:
    parts = count_parts(cfg, 0)
    return Counts(sum(part.total_params for part in parts), sum(part.active_params for part in parts))


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Forward and backward of one token: three times the forward pass. What is recomputed is not counted."""
    return 3.0 * sum(part.forward_flops for part in count_parts(cfg, seq_len))


def kv_bytes_per_token(cfg: ModelConfig, dtype_bytes: int) -> int:
    """What a cached token holds in memory: a key and a value of each layer and head."""
    return 2 * cfg.n_layers * cfg.kv_n_heads * cfg.head_dim * dtype_bytes
