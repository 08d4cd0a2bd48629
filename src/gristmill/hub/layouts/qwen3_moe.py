"""The published Qwen3-MoE layout: RMSNorm, and normalized queries and keys.

Q, k and v are separate tensors, and so are each expert's matrices. The down projection is the transpose of our w2.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gristmill.errors import InputError
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
    switch,
    two_bases,
    whole,
)
from gristmill.model import ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter


class Qwen3MoE(PublishedLayout):
    model_type = "qwen3_moe"
    title = "Qwen3-MoE"
    requirements = "has rms_norm and qk_norm without clipping"
    router = "mlp.gate"
    splits_experts = True
    quantized_usage = (
        "`gristmill generate . 'def fibonacci('`. The tensors are in the layout of compressed-tensors: with that "
        "package installed, transformers' `AutoModelForCausalLM.from_pretrained` reads them (without "
        "`dequantize=True`, which knows one number of bits only); vLLM and SGLang know the layout too."
    )
    gguf_architecture = "qwen3moe"
    gguf_norm_2 = "ffn_norm"

    def computes(self, cfg: ModelConfig) -> bool:
        return cfg.norm == "rms_norm" and cfg.qk_norm and cfg.clip_qkv is None and not cfg.moe_router_bias

    def tensors(self, cfg: ModelConfig) -> TensorMap:
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

    def to_json(self, cfg: ModelConfig, ids: SpecialIds | None, dtype: torch.dtype) -> dict[str, Any]:
        if cfg.moe_normalize_expert_weights not in (None, 1.0):
            raise InputError(
                f"moe_normalize_expert_weights={cfg.moe_normalize_expert_weights} has no place in the qwen3_moe "
                "layout; it knows 1 and null"
            )
        special = {} if ids is None else ids.for_config()
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": self.model_type,
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

    def from_json(self, config: Mapping[str, Any]) -> ModelConfig:
        with describe(self.model_type):
            require(config, "hidden_act", "silu", "swish")
            require(config, "attention_bias", False)
            require_plain(config)
            d_model = whole(config, "hidden_size", default=2048)
            n_layers = whole(config, "num_hidden_layers", default=24)
            n_heads = whole(config, "num_attention_heads", default=32)
            context = whole(config, "max_position_embeddings", default=32768)
            _require_whole_context(config, context)
            _require_experts_everywhere(config, n_layers)
            head_dim = None if config.get("head_dim") is None else whole(config, "head_dim", default=0)
            return ModelConfig(
                d_model=d_model,
                n_layers=n_layers,
                n_heads=n_heads,
                kv_n_heads=whole(config, "num_key_value_heads", default=4),
                head_size=None if head_dim is None or head_dim * n_heads == d_model else head_dim,
                max_seq_len=context,
                vocab_size=whole(config, "vocab_size", default=151936),
                rope_theta=_theta(config),
                clip_qkv=None,
                norm="rms_norm",
                norm_eps=number(config, "rms_norm_eps", 1e-6),
                qk_norm=True,
                tie_word_embeddings=switch(config, "tie_word_embeddings"),
                ffn_hidden_size=whole(config, "moe_intermediate_size", default=768),
                # transformers 5 saves the number under a name of its own
                moe_num_experts=whole(config, "num_experts", "num_local_experts", default=128),
                moe_top_k=whole(config, "num_experts_per_tok", default=8),
                moe_loss_weight=number(config, "router_aux_loss_coef", 0.001),
                moe_normalize_expert_weights=1.0 if switch(config, "norm_topk_prob") else None,
                initializer_range=number(config, "initializer_range", 0.02),
            )

    def gguf_attention(self, cfg: ModelConfig, ours: str, theirs: str) -> TensorMap:
        D, C = cfg.d_model, cfg.head_dim
        return {
            f"{ours}attn.Wqkv.weight": [
                Piece(f"{theirs}attn_q.weight", (cfg.n_heads * C, D)),
                Piece(f"{theirs}attn_k.weight", (cfg.kv_n_heads * C, D)),
                Piece(f"{theirs}attn_v.weight", (cfg.kv_n_heads * C, D)),
            ],
            f"{ours}attn.q_norm.weight": [Piece(f"{theirs}attn_q_norm.weight", (C,))],
            f"{ours}attn.k_norm.weight": [Piece(f"{theirs}attn_k_norm.weight", (C,))],
        }

    def add_gguf_settings(self, writer: "GGUFWriter", cfg: ModelConfig) -> None:
        writer.add_layer_norm_rms_eps(cfg.norm_eps)
        writer.add_key_length(cfg.head_dim)
        writer.add_value_length(cfg.head_dim)
        writer.add_expert_feed_forward_length(cfg.ffn_hidden_size)


QWEN3_MOE = Qwen3MoE()


def _require_whole_context(config: Mapping[str, Any], context: int) -> None:
    """Raises InputError when the layers would attend to a part of the context only."""
    if not switch(config, "use_sliding_window") or config.get("sliding_window", 0) is None:
        return
    window = whole(config, "sliding_window", default=4096)
    if window < context:
        raise InputError(f"config.json says sliding_window={window}; only attention to the whole context is supported")


def _require_experts_everywhere(config: Mapping[str, Any], n_layers: int) -> None:
    """Raises InputError when some of the layers would have no experts."""
    step, dense = whole(config, "decoder_sparse_step", default=1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise ValueError(f"mlp_only_layers={dense!r:.80} must be a list of whole numbers")
    if step != 1 or any(0 <= layer < n_layers for layer in dense):
        given = f"decoder_sparse_step={step} and mlp_only_layers={dense!r:.80}"
        raise InputError(f"config.json says {given}; each layer must have experts")


def _theta(config: Mapping[str, Any]) -> float:
    """The rotary base. Raises InputError where transformers would rotate by another one than a place says."""
    given = rotary_bases(config)
    seen = [base for place, base in given.items() if not (config.get("rope_scaling") and place.startswith("rope_par"))]
    rotated = next(iter(seen), DEFAULT_THETA)  # transformers does not look into rope_parameters when there is a scaling
    if any(base != rotated for base in given.values()):
        raise two_bases(given)
    return rotated
