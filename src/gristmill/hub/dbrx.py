"""The published DBRX layout: tensor names and `config.json`, both ways. Reads and writes no file."""

from collections.abc import Mapping
from typing import Any

import torch

from gristmill.errors import InputError
from gristmill.hub.layout import Layout, Piece
from gristmill.hub.settings import SpecialIds, describe, require, require_plain_rotation
from gristmill.model import ModelConfig

NO_CLIP = 1e30  # transformers and vLLM want a number; no finite activation of a working model comes near this one
SILENT_THETA = (
    10000.0  # what transformers 5 rotates by, and saves, when a configuration names its base only in attn_config
)


def layout(cfg: ModelConfig) -> Layout:
    D, V, C = cfg.d_model, cfg.vocab_size or 0, cfg.head_dim
    stacked = (cfg.moe_num_experts * cfg.ffn_hidden_size, D)
    table = {"wte.weight": [Piece("transformer.wte.weight", (V, D))]}
    for i in range(cfg.n_layers):
        ours, theirs = f"blocks.{i}.", f"transformer.blocks.{i}."
        table |= {
            f"{ours}norm_1.weight": [Piece(f"{theirs}norm_attn_norm.norm_1.weight", (D,))],
            f"{ours}norm_2.weight": [Piece(f"{theirs}norm_attn_norm.norm_2.weight", (D,))],
            f"{ours}attn.Wqkv.weight": [
                Piece(f"{theirs}norm_attn_norm.attn.Wqkv.weight", ((cfg.n_heads + 2 * cfg.kv_n_heads) * C, D))
            ],
            f"{ours}attn.out_proj.weight": [Piece(f"{theirs}norm_attn_norm.attn.out_proj.weight", (D, D))],
            f"{ours}ffn.router.weight": [Piece(f"{theirs}ffn.router.layer.weight", (cfg.moe_num_experts, D))],
            f"{ours}ffn.experts.w1": [Piece(f"{theirs}ffn.experts.mlp.w1", stacked)],
            f"{ours}ffn.experts.v1": [Piece(f"{theirs}ffn.experts.mlp.v1", stacked)],
            f"{ours}ffn.experts.w2": [Piece(f"{theirs}ffn.experts.mlp.w2", stacked)],
        }
    table["norm_f.weight"] = [Piece("transformer.norm_f.weight", (D,))]
    table["lm_head.weight"] = [Piece("lm_head.weight", (V, D))]
    return table


def to_json(cfg: ModelConfig, ids: SpecialIds | None, dtype: torch.dtype) -> dict[str, Any]:
    """The published `config.json`, with what transformers 5 needs to read it correctly."""
    special = {} if ids is None else ids.for_config()
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_layers": cfg.n_layers,
        "max_seq_len": cfg.max_seq_len,
        "vocab_size": cfg.vocab_size,
        "attn_config": {
            "attn_pdrop": 0.0,
            "clip_qkv": cfg.clip_qkv if cfg.clip_qkv is not None else NO_CLIP,
            "kv_n_heads": cfg.kv_n_heads,
            "rope_theta": cfg.rope_theta,  # must be here for transformers 5 to build the model …
        },
        # … but this is the one that it rotates by; without it, it would use 10000 silently.
        "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"},
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": cfg.ffn_hidden_size,
            "moe_jitter_eps": cfg.moe_jitter_eps,
            "moe_loss_weight": cfg.moe_loss_weight,
            "moe_normalize_expert_weights": cfg.moe_normalize_expert_weights,
            "moe_num_experts": cfg.moe_num_experts,
            "moe_top_k": cfg.moe_top_k,
        },
        "resid_pdrop": 0.0,
        "emb_pdrop": 0.0,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": False,
        "use_cache": True,
        **special,
        "dtype": str(dtype).removeprefix("torch."),
    }


def from_json(config: Mapping[str, Any]) -> ModelConfig:
    """Our configuration for a published `config.json`; keys that it leaves out have the published defaults.

    Raises InputError when it asks for what this model does not have.
    """
    with describe("dbrx"):
        attn, ffn = config.get("attn_config") or {}, config.get("ffn_config") or {}
        require(config, "tie_word_embeddings", False)
        require(ffn.get("ffn_act_fn") or {}, "name", "silu")
        for name, dropout in (("resid_pdrop", config), ("emb_pdrop", config), ("attn_pdrop", attn)):
            require(dropout, name, 0)
        require_plain_rotation(config)
        clip = attn.get("clip_qkv")
        norm = ffn.get("moe_normalize_expert_weights", 1.0)
        return ModelConfig(
            d_model=config["d_model"],
            n_layers=config["n_layers"],
            n_heads=config["n_heads"],
            kv_n_heads=attn["kv_n_heads"],
            max_seq_len=config["max_seq_len"],
            vocab_size=config["vocab_size"],
            rope_theta=_theta(attn, config.get("rope_parameters") or {}),
            clip_qkv=None if clip is None or clip >= NO_CLIP else float(clip),
            ffn_hidden_size=ffn["ffn_hidden_size"],
            moe_num_experts=ffn["moe_num_experts"],
            moe_top_k=ffn["moe_top_k"],
            moe_loss_weight=float(ffn.get("moe_loss_weight", 0.01)),
            moe_jitter_eps=float(ffn.get("moe_jitter_eps") or 0.0),
            moe_normalize_expert_weights=None if norm is None else float(norm),
            initializer_range=float(config.get("initializer_range", 0.02)),
        )


def _theta(attn: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """The rotary base. Where the two places differ, one of them is the 10000 that transformers 5 fills in by itself."""
    given = {float(place["rope_theta"]) for place in (attn, rope) if "rope_theta" in place}
    meant = given - {SILENT_THETA} or given
    if not meant:
        raise KeyError("rope_theta")
    if len(meant) > 1:
        raise InputError(
            f"config.json gives two rotary bases, attn_config.rope_theta={attn['rope_theta']} and "
            f"rope_parameters.rope_theta={rope['rope_theta']}; make both the one that the model was trained with"
        )
    return meant.pop()
