"""Reads and writes Hugging Face directories of the published layouts."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gristmill.errors import InputError
from gristmill.hub.layouts import LAYOUTS, published_layout
from gristmill.hub.mapping import as_one_expert, from_published, to_published
from gristmill.hub.quantized import QuantizeConfig, from_quantized, read_settings, to_quantized
from gristmill.hub.settings import SpecialIds, read_json
from gristmill.hub.tensors import DTYPES, MAX_SHARD_BYTES, PACKED, Weights, open_weights, write_weights
from gristmill.model import ModelConfig

CONFIG_JSON = "config.json"
GENERATION_JSON = "generation_config.json"


# ---- reading -------------------------------------------------------------------------------------------


def read_published(folder: Path) -> tuple[ModelConfig, Weights]:
    """A Hugging Face directory as our configuration and weights; names and shapes are checked, nothing is loaded.

    Raises InputError when it is not one, or asks for what this model does not have, Failure when it is damaged.
    """
    config = read_json(folder / CONFIG_JSON)
    if config is None:
        raise InputError(f"{folder} is not a Hugging Face model: it has no {CONFIG_JSON}")
    model_type = config.get("model_type")
    layout = next((layout for layout in LAYOUTS if layout.model_type == model_type), None)
    if layout is None:
        known = ", ".join(layout.model_type for layout in LAYOUTS)
        raise InputError(f"{folder / CONFIG_JSON} says model_type={model_type!r}; the known layouts are {known}")
    cfg = layout.from_json(config)
    kinds = read_settings(config) if config.get("quantization_config") else set()
    published = open_weights(folder, DTYPES | PACKED if kinds else DTYPES)
    if cfg.n_layers > len(published):
        raise InputError(
            f"config.json says {cfg.n_layers:,} layers, and the weights are {len(published):,} tensors in all"
        )
    if layout.splits_experts and cfg.n_layers * cfg.moe_num_experts > len(published):
        raise InputError(
            f"config.json says {cfg.n_layers:,} layers of {cfg.moe_num_experts:,} experts, and the weights are "
            f"{len(published):,} tensors in all"
        )
    published = _without_frequencies(cfg, published)
    table = layout.tensors(cfg)
    if cfg.tie_word_embeddings:
        published = _without_copy_of_embedding(table["wte.weight"][0].name, published)
    if kinds:
        return cfg, from_quantized(cfg, table, published, kinds)
    return cfg, from_published(cfg, table, published)


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


def _without_copy_of_embedding(name: str, published: Weights) -> Weights:
    """Some files of tied models hold the shared matrix twice."""
    copy, embedding = published.get("lm_head.weight"), published.get(name)
    if copy is None or embedding is None:
        return published
    if not torch.equal(copy.load(), embedding.load()):
        raise InputError(f"config.json says tie_word_embeddings=true, and lm_head.weight differs from {name}")
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
    layout = published_layout(cfg)
    table = layout.tensors(cfg)
    if quantize is not None:
        published = to_quantized(cfg, table, weights, quantize)
        config = layout.to_json(cfg, ids, torch.bfloat16) | {"quantization_config": quantize.to_json(cfg)}
    else:
        published = to_published(table, weights)
        if dtype is not None:
            published = {name: weight.to(dtype) for name, weight in published.items()}
        config = layout.to_json(cfg, ids, dtype or main_dtype(published))
    _write_json(folder / CONFIG_JSON, config)
    if settings := ids.for_generation(generation or {}) if ids else generation:
        _write_json(folder / GENERATION_JSON, settings)
    write_weights(folder, published, max_shard_bytes, advance)


def main_dtype(weights: Weights) -> torch.dtype:
    """The one that most bytes are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for weight in weights.values():
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
