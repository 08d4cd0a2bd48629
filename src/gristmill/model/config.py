"""The model's shape, under the names that DBRX published. Imports nothing: every room may read it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A fine-grained mixture-of-experts decoder. The defaults are the published 132B DBRX.

    `vocab_size` None means: the tokenizer's, rounded up to a multiple of 128 (the recipe fills it in).
    `head_size` None means: d_model / n_heads. `qk_norm`: each head's query and key pass an RMSNorm before they turn.
    `ffn` "dense" replaces the experts by one GLU of width `ffn_hidden_size`: the same interface, for comparison.
    `moe_router_bias` adds a number to each expert's probability when experts are chosen (train.balance: bias moves it);
    no published layout has a place for it.
    Qwen3-MoE is `norm` "rms_norm" with `qk_norm`, no clipping and a head size of its own.
    """

    d_model: int = 6144
    n_layers: int = 40
    n_heads: int = 48
    kv_n_heads: int = 8
    head_size: int | None = None
    max_seq_len: int = 32768
    vocab_size: int | None = None
    rope_theta: float = 500000.0
    clip_qkv: float | None = 8.0
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    ffn: Literal["moe", "dense"] = "moe"
    ffn_hidden_size: int = 10752
    moe_num_experts: int = 16
    moe_top_k: int = 4
    moe_loss_weight: float = 0.05
    moe_jitter_eps: float = 0.0
    moe_normalize_expert_weights: float | None = 1.0
    moe_router_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            value = getattr(self, name)
            if value is not None and kind in (int, int | None) and type(value) is not int:
                raise ValueError(f"{name}={value!r} must be a whole number")
        if self.norm not in ("layer_norm", "rms_norm") or self.ffn not in ("moe", "dense"):
            raise ValueError(f"norm={self.norm!r} must be layer_norm or rms_norm, and ffn={self.ffn!r} moe or dense")
        for name in ("d_model", "n_layers", "n_heads", "kv_n_heads", "max_seq_len", "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_size is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} must be a multiple of n_heads={self.n_heads}, or give head_size")
        if self.head_dim < 2 or self.head_dim % 2:
            given = f"d_model={self.d_model} / n_heads={self.n_heads}" if self.head_size is None else "head_size"
            raise ValueError(f"{given}={self.head_dim} must be even and at least 2: rotary embedding turns pairs")
        if self.n_heads % self.kv_n_heads:
            raise ValueError(f"kv_n_heads={self.kv_n_heads} must divide n_heads={self.n_heads}")
        if not 1 <= self.moe_top_k <= self.moe_num_experts:
            raise ValueError(f"moe_top_k={self.moe_top_k} must be from 1 to moe_num_experts={self.moe_num_experts}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")
        if (power := self.moe_normalize_expert_weights) is not None and not 0 < power < float("inf"):
            raise ValueError(f"moe_normalize_expert_weights={power} must be positive and finite, or null for none")
        if self.clip_qkv is not None and not 0 < self.clip_qkv < float("inf"):
            raise ValueError(f"clip_qkv={self.clip_qkv} must be positive and finite, or null for no clipping")
        for name in ("rope_theta", "norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if not 0 <= self.moe_loss_weight < float("inf"):
            raise ValueError(f"moe_loss_weight={self.moe_loss_weight} must be finite and not negative")
        if self.moe_normalize_expert_weights is not None and not 0 < self.moe_normalize_expert_weights < float("inf"):
            raise ValueError(
                f"moe_normalize_expert_weights={self.moe_normalize_expert_weights} must be positive and finite (the "
                "power of a norm), or null for no normalization"
            )
        if self.moe_router_bias and self.ffn == "dense":
            raise ValueError("moe_router_bias=true has no effect with ffn=dense; leave one of them out")
        if not 0 <= self.moe_jitter_eps < 1:
            raise ValueError(f"moe_jitter_eps={self.moe_jitter_eps} must be from 0 to below 1")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads if self.head_size is None else self.head_size
