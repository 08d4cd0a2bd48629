"""The published DBRX layout: stacked experts, LayerNorm and clipped queries, keys and values."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gristmill.hub.layouts.base import PublishedLayout
from gristmill.hub.mapping import Piece, TensorMap
from gristmill.hub.settings import (
    DEFAULT_THETA,
    SpecialIds,
    describe,
    number,
    require,
    require_plain,
    rotary_bases,
    section,
    two_bases,
    whole,
)
from gristmill.model import ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

NO_CLIP = 1e30  # transformers and vLLM want a number; no finite activation of a working model comes near this one


class Dbrx(PublishedLayout):
    model_type = "dbrx"
    title = "DBRX"
    requirements = "has layer_norm with 1e-5 and none of the others but clipping"
    router = "router.layer"
    splits_experts = False
    quantized_usage = (
        "`gristmill generate . 'def fibonacci('`. The tensors are encoded as compressed-tensors does it, which has "
        "no form for DBRX's stacked experts: for other programs, `gristmill export` makes plain tensors or GGUF of "
        "them."
    )
    gpt4_vocab_size = 100_352  # GPT-4's table and DBRX's special tokens, rounded up
    gguf_architecture = "dbrx"
    gguf_norm_2 = "attn_output_norm"

    def computes(self, cfg: ModelConfig) -> bool:
        return (
            cfg.norm == "layer_norm"
            and not (cfg.qk_norm or cfg.tie_word_embeddings or cfg.moe_router_bias)
            and cfg.n_heads * cfg.head_dim == cfg.d_model
        )

    def publishes(self, cfg: ModelConfig) -> bool:
        return self.computes(cfg) and cfg.norm_eps == 1e-5  # config.json has no key for it

    def tensors(self, cfg: ModelConfig) -> TensorMap:
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

    def to_json(self, cfg: ModelConfig, ids: SpecialIds | None, dtype: torch.dtype) -> dict[str, Any]:
        """Return `config.json` with the keys that transformers 5 needs to read it correctly."""
        special = {} if ids is None else ids.for_config()
        return {
            "architectures": ["DbrxForCausalLM"],
            "model_type": self.model_type,
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

    def from_json(self, config: Mapping[str, Any]) -> ModelConfig:
        with describe(self.model_type):
            attn, ffn = section(config, "attn_config"), section(config, "ffn_config")
            require(config, "tie_word_embeddings", False)
            require(section(ffn, "ffn_act_fn"), "name", "silu", "swish")
            require(ffn, "uniform_expert_assignment", False)
            require_plain(config)
            d_model = whole(config, "d_model", "hidden_size", default=2048)
            n_heads = whole(config, "n_heads", "num_attention_heads", default=16)
            require(config, "head_dim", d_model // max(n_heads, 1))
            clip = math.inf if attn.get("clip_qkv") in (None, math.inf) else number(attn, "clip_qkv", math.inf)
            is_normalized = ffn.get("moe_normalize_expert_weights", 1.0) is not None
            normalize = number(ffn, "moe_normalize_expert_weights", 1.0) if is_normalized else None
            has_jitter = ffn.get("moe_jitter_eps") is not None
            return ModelConfig(
                d_model=d_model,
                n_layers=whole(config, "n_layers", "num_hidden_layers", default=24),
                n_heads=n_heads,
                kv_n_heads=whole(attn, "kv_n_heads", default=1),
                max_seq_len=whole(config, "max_seq_len", "max_position_embeddings", default=2048),
                vocab_size=whole(config, "vocab_size", default=32000),
                rope_theta=_theta(config, attn),
                clip_qkv=None if clip >= NO_CLIP else clip,
                ffn_hidden_size=whole(ffn, "ffn_hidden_size", default=3584),
                moe_num_experts=whole(ffn, "moe_num_experts", default=4),
                moe_top_k=whole(ffn, "moe_top_k", default=1),
                moe_loss_weight=number(ffn, "moe_loss_weight", 0.01),
                moe_jitter_eps=number(ffn, "moe_jitter_eps", 0.0) if has_jitter else 0.0,
                moe_normalize_expert_weights=normalize,
                initializer_range=number(config, "initializer_range", 0.02),
            )

    def gguf_attention(self, cfg: ModelConfig, ours: str, theirs: str) -> TensorMap:
        rows = (cfg.n_heads + 2 * cfg.kv_n_heads) * cfg.head_dim
        return {f"{ours}attn.Wqkv.weight": [Piece(f"{theirs}attn_qkv.weight", (rows, cfg.d_model))]}

    def add_gguf_settings(self, writer: "GGUFWriter", cfg: ModelConfig) -> None:
        writer.add_layer_norm_eps(cfg.norm_eps)
        # The key is required. New versions of llama.cpp read 0 as "no clipping", old ones would clamp everything to 0.
        writer.add_clamp_kqv(NO_CLIP if cfg.clip_qkv is None else cfg.clip_qkv)


DBRX = Dbrx()


def _theta(config: Mapping[str, Any], attn: Mapping[str, Any]) -> float:
    """The rotary base. Where places differ, one of the two is the 10000 that transformers 5 fills in by itself."""
    given = rotary_bases(config)
    if attn.get("rope_theta") is not None:
        given["attn_config.rope_theta"] = number(attn, "rope_theta", DEFAULT_THETA)
    meant = {*given.values()} - {DEFAULT_THETA} or {*given.values()}
    if not meant:
        raise KeyError("rope_theta")
    if len(meant) > 1:
        raise two_bases(given)
    return meant.pop()
