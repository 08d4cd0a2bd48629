"""The published Qwen3-MoE layout: tensor names and `config.json`, both ways. Reads and writes no file.

It publishes q, k and v apart, and each expert's three matrices apart, the last of them transposed against ours.
"""

from collections.abc import Mapping
from typing import Any

import torch

from gristmill.errors import InputError
from gristmill.hub.layout import Layout, Piece
from gristmill.hub.settings import SpecialIds, describe, require, require_plain_rotation
from gristmill.model import ModelConfig


def layout(cfg: ModelConfig) -> Layout:
    D, F, V, C = cfg.d_model, cfg.ffn_hidden_size, cfg.vocab_size or 0, cfg.head_dim
    table = {"wte.weight": [Piece("model.embed_tokens.weight", (V, D))]}
    for i in range(cfg.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        experts = [f"{theirs}mlp.experts.{expert}." for expert in range(cfg.moe_num_experts)]
        table |= {
            f"{ours}norm_1.weight": [Piece(f"{theirs}input_layernorm.weight", (D,))],
            f"{ours}norm_2.weight": [Piece(f"{theirs}post_attention_layernorm.weight", (D,))],
            f"{ours}attn.Wqkv.weight": [
                Piece(f"{theirs}self_attn.q_proj.weight", (cfg.n_heads * C, D)),
                Piece(f"{theirs}self_attn.k_proj.weight", (cfg.kv_n_heads * C, D)),
                Piece(f"{theirs}self_attn.v_proj.weight", (cfg.kv_n_heads * C, D)),
            ],
            f"{ours}attn.out_proj.weight": [Piece(f"{theirs}self_attn.o_proj.weight", (D, cfg.n_heads * C))],
            f"{ours}attn.q_norm.weight": [Piece(f"{theirs}self_attn.q_norm.weight", (C,))],
            f"{ours}attn.k_norm.weight": [Piece(f"{theirs}self_attn.k_norm.weight", (C,))],
            f"{ours}ffn.router.weight": [Piece(f"{theirs}mlp.gate.weight", (cfg.moe_num_experts, D))],
            f"{ours}ffn.experts.w1": [Piece(f"{expert}gate_proj.weight", (F, D)) for expert in experts],
            f"{ours}ffn.experts.v1": [Piece(f"{expert}up_proj.weight", (F, D)) for expert in experts],
            f"{ours}ffn.experts.w2": [
                Piece(f"{expert}down_proj.weight", (D, F), transposed=True) for expert in experts
            ],
        }
    table["norm_f.weight"] = [Piece("model.norm.weight", (D,))]
    if not cfg.tie_word_embeddings:
        table["lm_head.weight"] = [Piece("lm_head.weight", (V, D))]
    return table


def to_json(cfg: ModelConfig, ids: SpecialIds | None, dtype: torch.dtype) -> dict[str, Any]:
    """The published `config.json`. Raises InputError for what Qwen3-MoE cannot say."""
    if cfg.moe_normalize_expert_weights not in (None, 1.0):
        raise InputError(
            f"moe_normalize_expert_weights={cfg.moe_normalize_expert_weights} has no place in the qwen3_moe layout; it "
            "knows 1 and null"
        )
    special = {} if ids is None else ids.for_config()
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_n_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_seq_len,
        "vocab_size": cfg.vocab_size,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,  # the published place, which vLLM and SGLang read …
        "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"},  # … and that of transformers 5
        "intermediate_size": cfg.ffn_hidden_size,  # of layers without experts, of which there are none
        "moe_intermediate_size": cfg.ffn_hidden_size,
        "num_experts": cfg.moe_num_experts,
        "num_experts_per_tok": cfg.moe_top_k,
        "norm_topk_prob": cfg.moe_normalize_expert_weights is not None,
        "router_aux_loss_coef": cfg.moe_loss_weight,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "use_cache": True,
        **special,
        "dtype": str(dtype).removeprefix("torch."),
    }


def from_json(config: Mapping[str, Any]) -> ModelConfig:
    """Our configuration for a published `config.json`. Raises InputError when it asks for what this model lacks."""
    with describe("qwen3_moe"):
        require(config, "hidden_act", "silu")
        require(config, "attention_bias", False)
        require(config, "attention_dropout", 0)
        require(config, "use_sliding_window", False)
        require(config, "decoder_sparse_step", 1)
        require(config, "mlp_only_layers", [])
        require_plain_rotation(config)
        rope = config.get("rope_parameters") or {}
        head_dim, heads = config.get("head_dim"), config["num_attention_heads"]
        return ModelConfig(
            d_model=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            kv_n_heads=config["num_key_value_heads"],
            head_size=None if head_dim is None or head_dim * heads == config["hidden_size"] else head_dim,
            max_seq_len=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
            rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]),
            clip_qkv=None,
            norm="rms_norm",
            norm_eps=float(config["rms_norm_eps"]),
            qk_norm=True,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            ffn_hidden_size=config["moe_intermediate_size"],
            # transformers 5 saves the number under a name of its own
            moe_num_experts=config["num_local_experts"] if "num_local_experts" in config else config["num_experts"],
            moe_top_k=config["num_experts_per_tok"],
            moe_loss_weight=float(config.get("router_aux_loss_coef", 0.001)),
            moe_normalize_expert_weights=1.0 if config.get("norm_topk_prob") else None,
            initializer_range=float(config.get("initializer_range", 0.02)),
        )
