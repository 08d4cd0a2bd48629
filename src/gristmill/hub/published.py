"""Hugging Face directories of the layouts that this model can be: `dbrx` and `qwen3_moe`."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gristmill.errors import InputError
from gristmill.hub import dbrx, qwen3_moe
from gristmill.hub.layout import Layout, as_one_expert, from_published, to_published
from gristmill.hub.quantized import QuantizeConfig, from_quantized, read_settings, to_quantized
from gristmill.hub.settings import SpecialIds, read_json
from gristmill.hub.tensors import DTYPES, MAX_SHARD_BYTES, PACKED, Weights, open_weights, write_weights
from gristmill.model import ModelConfig

CONFIG_JSON = "config.json"
GENERATION_JSON = "generation_config.json"
MODEL_TYPES = ("dbrx", "qwen3_moe")


# ---- reading -------------------------------------------------------------------------------------------


def read_published(folder: Path) -> tuple[ModelConfig, Weights]:
    """A Hugging Face directory as our configuration and weights; names and shapes are checked, nothing is loaded.

    Raises InputError when it is not one, or asks for what this model does not have, Failure when it is damaged.
    """
    config = read_json(folder / CONFIG_JSON)
    if config is None:
        raise InputError(f"{folder} is not a Hugging Face model: it has no {CONFIG_JSON}")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"{folder / CONFIG_JSON} says model_type={model_type!r}; the known layouts are {', '.join(MODEL_TYPES)}"
        )
    cfg = module_of(model_type).from_json(config)
    kinds = read_settings(config) if config.get("quantization_config") else set()
    published = open_weights(folder, DTYPES | PACKED if kinds else DTYPES)
    if cfg.n_layers > len(published):
        raise InputError(
            f"config.json says {cfg.n_layers:,} layers, and the weights are {len(published):,} tensors in all"
        )
    if model_type == "qwen3_moe" and cfg.n_layers * cfg.moe_num_experts > len(published):
        raise InputError(
            f"config.json says {cfg.n_layers:,} layers of {cfg.moe_num_experts:,} experts, and the weights are "
            f"{len(published):,} tensors in all"
        )
    published = _without_frequencies(cfg, published)
    if cfg.tie_word_embeddings:
        published = _without_copy_of_embedding(published)
    if kinds:
        return cfg, from_quantized(cfg, layout_of(cfg), published, kinds)
    return cfg, from_published(cfg, layout_of(cfg), published)


def _without_frequencies(cfg: ModelConfig, published: Weights) -> Weights:
    """Older programs store the rotary frequencies, which follow from the base.

    Raises InputError for frequencies of another base: the model was trained with those.
    """
    kept = {}
    for name, weight in published.items():
        if not re.fullmatch(r"(.*\.)?rotary_emb\.(original_)?inv_freq", name):
            kept[name] = weight
            continue
        wanted = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim)
        rounding = torch.finfo(weight.dtype)
        if weight.shape != wanted.shape or not torch.allclose(
            weight.load().double(),
            wanted.to(weight.dtype).double(),
            rtol=max(1e-5, 2 * rounding.eps),
            atol=rounding.smallest_normal * rounding.eps,
        ):
            raise InputError(
                f"{name} holds other rotary frequencies than those of rope_theta={cfg.rope_theta} and a head size of "
                f"{cfg.head_dim}; correct config.json to say what the model was trained with"
            )
    return kept


def _without_copy_of_embedding(published: Weights) -> Weights:
    """Some files of tied models hold the shared matrix twice."""
    copy, embedding = published.get("lm_head.weight"), published.get("model.embed_tokens.weight")
    if copy is None or embedding is None:
        return published
    if not torch.equal(copy.load(), embedding.load()):
        raise InputError(
            "config.json says tie_word_embeddings=true, and lm_head.weight differs from model.embed_tokens.weight"
        )
    return {name: weight for name, weight in published.items() if weight is not copy}


# ---- writing -------------------------------------------------------------------------------------------


def write_published(
    folder: Path,
    cfg: ModelConfig,
    weights: Weights,
    ids: SpecialIds | None,
    *,
    dtype: torch.dtype | None = None,
    quantize: QuantizeConfig | None = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[float], None] = lambda num_bytes: None,
) -> None:
    """Write `config.json`, `generation_config.json` and the weights into the existing directory `folder`.

    dtype: of all weights; None keeps each one's. quantize: how matrices become codes; then `dtype` says nothing.
    ids: None when the model has no tokenizer. generation: settings that the model was published with. A dense FFN
    leaves as a mixture of one expert. Raises InputError when the configuration fits no published layout.
    """
    cfg, weights = as_one_expert(cfg, weights)
    layout, to_json = layout_of(cfg), module_of(model_type_of(cfg)).to_json
    if quantize is not None:
        published = to_quantized(cfg, layout, weights, quantize)
        config = to_json(cfg, ids, torch.bfloat16) | {"quantization_config": quantize.to_json(cfg)}
    else:
        published = to_published(layout, weights)
        if dtype is not None:
            published = {name: weight.to(dtype) for name, weight in published.items()}
        config = to_json(cfg, ids, dtype or main_dtype(published))
    _write_json(folder / CONFIG_JSON, config)
    if settings := ids.for_generation(generation or {}) if ids else generation:
        _write_json(folder / GENERATION_JSON, settings)
    write_weights(folder, published, max_shard_bytes, advance)


def module_of(model_type: str) -> ModuleType:
    """What knows a layout: `from_json`, `to_json`, `layout`."""
    return {"dbrx": dbrx, "qwen3_moe": qwen3_moe}[model_type]


def layout_of(cfg: ModelConfig) -> Layout:
    return module_of(model_type_of(cfg)).layout(cfg)


def model_type_of(cfg: ModelConfig) -> str:
    """The published layout that can say this configuration. Raises InputError when none can."""
    if cfg.moe_router_bias:
        raise InputError("no published layout has moe_router_bias; train with another train.balance to publish")
    own_head_size = cfg.head_dim * cfg.n_heads != cfg.d_model
    match cfg.norm:
        case "layer_norm" if not (cfg.qk_norm or cfg.tie_word_embeddings or own_head_size or cfg.norm_eps != 1e-5):
            return "dbrx"
        case "rms_norm" if cfg.qk_norm and cfg.clip_qkv is None:
            return "qwen3_moe"
        case _:
            raise InputError(
                f"no published layout has norm={cfg.norm}, qk_norm={cfg.qk_norm}, clip_qkv={cfg.clip_qkv}, "
                f"head_size={cfg.head_size}, tie_word_embeddings={cfg.tie_word_embeddings}, norm_eps={cfg.norm_eps} "
                "together: dbrx has layer_norm with 1e-5 and none of the others but clipping, qwen3_moe has rms_norm "
                "and qk_norm without clipping"
            )


def main_dtype(weights: Weights) -> torch.dtype:
    """The one that most bytes are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for weight in weights.values():
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
