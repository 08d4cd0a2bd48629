"""The published DBRX layout: tensor names, shapes and `config.json`, both ways.

A dense FFN leaves as a mixture of one expert that every token takes with weight 1: the same function.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.errors import Failure, InputError
from gristmill.hub.tensors import read_tensors, write_tensors
from gristmill.model import ModelConfig

# Our names are the keys; a block's stand below `blocks.{i}.`, the published ones below `transformer.blocks.{i}.`.
TOP = {
    "wte.weight": "transformer.wte.weight",
    "norm_f.weight": "transformer.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
BLOCK = {
    "norm_1.weight": "norm_attn_norm.norm_1.weight",
    "norm_2.weight": "norm_attn_norm.norm_2.weight",
    "attn.Wqkv.weight": "norm_attn_norm.attn.Wqkv.weight",
    "attn.out_proj.weight": "norm_attn_norm.attn.out_proj.weight",
    "ffn.router.weight": "ffn.router.layer.weight",
    "ffn.experts.w1": "ffn.experts.mlp.w1",
    "ffn.experts.v1": "ffn.experts.mlp.v1",
    "ffn.experts.w2": "ffn.experts.mlp.w2",
}
TOP_BACK = {theirs: ours for ours, theirs in TOP.items()}
BLOCK_BACK = {theirs: ours for ours, theirs in BLOCK.items()}

NO_CLIP = 1e30  # transformers and vLLM want a number; no finite activation of a working model comes near this one


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """What a Hugging Face configuration says of the tokenizer."""

    eot_id: int
    pad_id: int
    im_end_id: int


# ---- writing -------------------------------------------------------------------------------------------


def write_dbrx(
    folder: Path,
    cfg: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    ids: SpecialIds,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `config.json`, `generation_config.json` and the weights into the existing directory `folder`."""
    _write_json(folder / "config.json", to_json(cfg, ids, dtype))
    generation = {
        "bos_token_id": ids.eot_id,
        "eos_token_id": [ids.eot_id, ids.im_end_id],  # a document's end, a chat turn's end
        "pad_token_id": ids.pad_id,
    }
    _write_json(folder / "generation_config.json", generation)
    published = ((name, tensor.to(dtype)) for name, tensor in to_published(cfg, tensors))
    write_tensors(folder, published, max_shard_bytes)


def to_published(cfg: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under the published names; experts [E, F, D] as [E*F, D], without a copy."""
    for name, tensor in tensors:
        if name in TOP:
            yield TOP[name], tensor
            continue
        _, layer, inner = name.split(".", 2)
        if cfg.ffn == "dense" and inner in ("ffn.w1", "ffn.v1", "ffn.w2"):
            if inner == "ffn.w1":
                yield f"transformer.blocks.{layer}.{BLOCK['ffn.router.weight']}", tensor.new_zeros(1, cfg.d_model)
            inner = inner.replace("ffn.", "ffn.experts.")
        yield f"transformer.blocks.{layer}.{BLOCK[inner]}", tensor.flatten(0, 1) if tensor.ndim == 3 else tensor


def to_json(cfg: ModelConfig, ids: SpecialIds, dtype: torch.dtype) -> dict[str, Any]:
    """The published `config.json`, with what transformers 5 needs to read it correctly."""
    dense = cfg.ffn == "dense"
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
            "moe_jitter_eps": 0.0 if dense else cfg.moe_jitter_eps,
            "moe_loss_weight": 0.0 if dense else cfg.moe_loss_weight,
            "moe_normalize_expert_weights": 1.0 if dense else cfg.moe_normalize_expert_weights,
            "moe_num_experts": 1 if dense else cfg.moe_num_experts,
            "moe_top_k": 1 if dense else cfg.moe_top_k,
        },
        "resid_pdrop": 0.0,
        "emb_pdrop": 0.0,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": ids.eot_id,
        "eos_token_id": ids.eot_id,
        "pad_token_id": ids.pad_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- reading -------------------------------------------------------------------------------------------


def read_dbrx(folder: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """A Hugging Face `dbrx` directory as our configuration and tensors, one at a time under our own names.

    Raises InputError when it is not one, or uses what this model does not have.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a Hugging Face model: it has no config.json")
    try:
        parsed = json.loads(file.read_text())
    except ValueError as problem:
        raise Failure(f"{file} is not JSON: {problem}") from None
    if not isinstance(parsed, dict):
        raise Failure(f"{file} is damaged: it holds no JSON object")
    cfg = from_json(parsed)
    return cfg, from_published(cfg, read_tensors(folder))


def from_json(config: Mapping[str, Any]) -> ModelConfig:
    """Our configuration for a published `config.json`; keys that it leaves out have the published defaults."""
    attn, ffn = config.get("attn_config") or {}, config.get("ffn_config") or {}
    rope = config.get("rope_parameters") or {}
    _require(config, "model_type", "dbrx")
    _require(config, "tie_word_embeddings", False, absent=False)
    _require(ffn.get("ffn_act_fn") or {}, "name", "silu", absent="silu")
    _require(rope, "rope_type", "default", absent="default")
    clip = attn.get("clip_qkv")
    norm = ffn.get("moe_normalize_expert_weights", 1.0)
    try:
        return ModelConfig(
            d_model=config["d_model"],
            n_layers=config["n_layers"],
            n_heads=config["n_heads"],
            kv_n_heads=attn["kv_n_heads"],
            max_seq_len=config["max_seq_len"],
            vocab_size=config["vocab_size"],
            rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else attn["rope_theta"]),
            clip_qkv=None if clip is None or clip >= NO_CLIP else float(clip),
            ffn_hidden_size=ffn["ffn_hidden_size"],
            moe_num_experts=ffn["moe_num_experts"],
            moe_top_k=ffn["moe_top_k"],
            moe_loss_weight=float(ffn.get("moe_loss_weight", 0.01)),
            moe_jitter_eps=float(ffn.get("moe_jitter_eps") or 0.0),
            moe_normalize_expert_weights=None if norm is None else float(norm),
            initializer_range=float(config.get("initializer_range", 0.02)),
        )
    except KeyError as missing:
        raise InputError(f"config.json lacks {missing}, which a dbrx model needs") from None
    except (ValueError, TypeError) as problem:
        raise InputError(f"config.json does not describe a dbrx model: {problem}") from None


def from_published(cfg: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if name in TOP_BACK:
            yield TOP_BACK[name], tensor
            continue
        parts = name.split(".", 3)
        if len(parts) != 4 or parts[:2] != ["transformer", "blocks"] or parts[3] not in BLOCK_BACK:
            raise InputError(f"the weights hold {name!r}, which a dbrx model does not have")
        ours = f"blocks.{parts[2]}.{BLOCK_BACK[parts[3]]}"
        if ".experts." in ours:
            shape = (cfg.moe_num_experts, cfg.ffn_hidden_size, cfg.d_model)
            if tensor.shape != (shape[0] * shape[1], shape[2]):
                raise InputError(f"{name} has shape {tuple(tensor.shape)}; the configuration says {shape} stacked")
            tensor = tensor.view(shape)
        yield ours, tensor


def _require(config: Mapping[str, Any], key: str, wanted: Any, absent: Any = None) -> None:
    if (given := config.get(key, absent)) != wanted:
        raise InputError(f"config.json says {key}={given!r}; this model knows only {wanted!r}")
