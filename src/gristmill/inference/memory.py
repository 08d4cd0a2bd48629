"""Divides a memory bound between a model's weights, its experts and the key/value cache, before any of it is taken."""

import re
from dataclasses import replace

from gristmill.errors import InputError
from gristmill.hub import QuantizedWeight, Weight, Weights
from gristmill.inference.disk import AT_ONCE, READERS
from gristmill.inference.runner import LOGITS_ROWS
from gristmill.inference.scheduler import CACHE_TOKENS, EngineConfig
from gristmill.kernels import native
from gristmill.model import Transformer
from gristmill.model.counts import kv_bytes_per_token

SPARE_BYTES = 64 * 2**20  # for libraries when they are first used, and for gaps between allocations


def parse_bytes(text: str) -> int:
    """ "16GiB", "900 MB": raises InputError for another form."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT])(i?)B", text.strip())
    if found is None:
        raise InputError(f"{text!r:.40} is no amount of memory; write it like 16GiB, 900MiB or 1.5TB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1))


def resident_bytes() -> int:
    """Return the bytes of this process, without the pages of files."""
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def divide(
    model: Transformer, weights: Weights, cfg: EngineConfig, memory_bytes: int
) -> tuple[EngineConfig, int | None]:
    """Divide a memory bound: first all weights, then the cache, up to the tokens that `max_running` sequences of the
    whole context have. Experts that do not fit stay on disk, and the cache has its usual size, `CACHE_TOKENS`.

    A given `cfg.cache_tokens` is kept.

    Returns:
        The configuration with its cache, and the bytes for experts; None when all of them fit.

    Raises InputError when a dense model does not fit with a cache for one sequence.
    """
    block, given = cfg.block_tokens, cfg.cache_tokens
    token_bytes = cache_bytes_per_token(model)
    context = -(-model.cfg.max_seq_len // block) * block
    most = context * cfg.max_running  # no step can use more
    left = memory_bytes - _bytes_without_experts(model, weights, cfg)
    left_in_memory = left - _expert_bytes(model, weights)
    least = given or min(CACHE_TOKENS, context)
    if least * token_bytes <= left_in_memory:
        tokens = given or min(most, left_in_memory // token_bytes // block * block)
        return replace(cfg, cache_tokens=tokens), None
    if model.cfg.ffn == "dense":
        lacking = -(-(least * token_bytes - left_in_memory) // 2**20)
        raise InputError(
            f"the memory has no room for the weights and a cache of {least:,} tokens; give {lacking:,} MiB more, "
            "lower cache_tokens, or quantize the model"
        )
    tokens = given or min(CACHE_TOKENS, most)
    return replace(cfg, cache_tokens=tokens), left - tokens * token_bytes


def cache_bytes_per_token(model: Transformer) -> int:
    """Return the bytes of a token's keys and values in the cache of the native kernels, which pad the heads."""
    head = model.cfg.head_dim
    return kv_bytes_per_token(model.cfg, model.compute_dtype.itemsize) * native.padded(head) // head


def _bytes_without_experts(model: Transformer, weights: Weights, cfg: EngineConfig) -> int:
    """The process with everything but the experts and the cache: what it has now, and what it will allocate."""
    shape, itemsize = model.cfg, model.compute_dtype.itemsize
    matrices = sum(
        _in_memory(weight, itemsize)
        for name, weight in weights.items()
        if ".experts." not in name and name != "wte.weight"
    )
    if shape.tie_word_embeddings:
        matrices += _in_memory(weights["wte.weight"], itemsize)
    expert = 3 * shape.d_model * shape.ffn_hidden_size * itemsize
    assert shape.vocab_size is not None
    step = cfg.token_budget * (shape.moe_top_k + 4) * (shape.d_model + shape.ffn_hidden_size) * 4
    logits = LOGITS_ROWS * shape.vocab_size * 8
    return SPARE_BYTES + resident_bytes() + matrices + step + logits + (AT_ONCE + 6 * READERS) * expert


def _in_memory(weight: Weight, itemsize: int) -> int:
    return weight.nbytes // weight.dtype.itemsize * itemsize


def _expert_bytes(model: Transformer, weights: Weights) -> int:
    """All experts in memory, and one layer of them as stored and as converted, which packing needs for a moment."""
    if model.cfg.ffn == "dense":
        return 0
    itemsize = model.compute_dtype.itemsize
    total = sum(
        weight.stored_bytes if isinstance(weight, QuantizedWeight) else _in_memory(weight, itemsize)
        for name, weight in weights.items()
        if ".experts." in name
    )
    layer = 3 * model.cfg.moe_num_experts * model.cfg.d_model * model.cfg.ffn_hidden_size
    return total + 2 * layer * 4
