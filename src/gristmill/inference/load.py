"""Finds and loads a model wherever it stands: a run folder, a checkpoint, a Hugging Face directory."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from gristmill.current import find_checkpoint
from gristmill.errors import InputError
from gristmill.hub import QuantizedWeight, Weights, assemble
from gristmill.hub.checkpoint import CONFIG
from gristmill.hub.folder import ModelFolder, open_model
from gristmill.hub.published import CONFIG_JSON, main_dtype
from gristmill.hub.tensors import check_names
from gristmill.inference.disk import AT_ONCE, READERS
from gristmill.inference.engine import Engine
from gristmill.inference.generate import prompt_ids
from gristmill.inference.layers import NativeLayers
from gristmill.inference.runner import LOGITS_ROWS
from gristmill.inference.scheduler import EngineConfig
from gristmill.kernels import native
from gristmill.model import Transformer
from gristmill.model.counts import kv_bytes_per_token
from gristmill.tokenizer import Tokenizer

SPARE_BYTES = 64 * 2**20  # what libraries take when they are first used, and what lies between pieces of memory


def load_model(path: Path, compute_dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """The model, ready for inference, and its tokenizer.

    Raises InputError when `path` holds no model, Failure when what it holds is damaged.
    """
    found, tokenizer = _open(path)
    return assemble(found.cfg, found.weights, compute_dtype), tokenizer


def load_engine(
    path: Path,
    cfg: EngineConfig | None = None,
    compute_dtype: torch.dtype | None = None,
    memory_bytes: int | None = None,
) -> Engine:
    """An engine of the model, whose matrices are packed as they are read: none is in memory twice.

    compute_dtype: None is that of the stored weights; bf16 where they are quantized, fp32 where they are fp16.
    memory_bytes: for the process, everything that cannot be read again included; experts that do not fit stay on
    disk. The system may keep more of the files in memory that it has to spare. Raises as `load_model`, and InputError
    when too little is left.
    """
    return _engine(*_open(path), cfg or EngineConfig(), compute_dtype, memory_bytes)


def load_for_answer(
    path: Path, prompt: str | Sequence[Mapping[str, str]], max_tokens: int, memory_bytes: int | None = None
) -> Engine:
    """Load an engine whose cache holds this prompt and an answer of `max_tokens`, or of as many as the context allows.

    Args:
        prompt: see `stream`.

    Raises as `load_engine`.
    """
    found, tokenizer = _open(path)
    tokens = min(len(prompt_ids(tokenizer, prompt)) + max_tokens, found.cfg.max_seq_len)
    block = EngineConfig.block_tokens
    return _engine(found, tokenizer, EngineConfig(cache_tokens=-(-tokens // block) * block), None, memory_bytes)


def _engine(
    found: ModelFolder,
    tokenizer: Tokenizer,
    cfg: EngineConfig,
    compute_dtype: torch.dtype | None,
    memory_bytes: int | None,
) -> Engine:
    compute_dtype = compute_dtype or _stored_dtype(found.weights)
    if not native.serves(torch.empty(0, dtype=compute_dtype)):
        if memory_bytes is not None:
            raise InputError("a memory bound needs the native kernels, which are not built here; leave it out")
        return Engine(assemble(found.cfg, found.weights, compute_dtype), cfg, tokenizer)
    with torch.device("meta"):
        model = Transformer(found.cfg, compute_dtype).eval().requires_grad_(False)
    check_names({name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}, found.weights)
    kept = {}
    for name, weight in found.weights.items():
        if name == "wte.weight" or "norm" in name or name.endswith("router_bias"):
            kept[name] = weight.load().to(compute_dtype if name == "wte.weight" else torch.float32)
    model.load_state_dict(kept, strict=False, assign=True)
    disk_bytes = None
    if memory_bytes is not None:
        if found.cfg.ffn == "dense":
            raise InputError("a memory bound leaves experts on disk, and this model is dense; leave it out")
        disk_bytes = memory_bytes - _taken(model, found.weights, cfg)
    return Engine(model, cfg, tokenizer, NativeLayers(model, found.weights, disk_bytes))


def parse_bytes(text: str) -> int:
    """ "16GiB", "900 MB": raises InputError for another form."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT])(i?)B", text.strip())
    if found is None:
        raise InputError(f"{text!r:.40} is no amount of memory; write it like 16GiB, 900MiB or 1.5TB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1))


def _stored_dtype(weights: Weights) -> torch.dtype:
    if any(isinstance(weight, QuantizedWeight) for weight in weights.values()):
        return torch.bfloat16
    return torch.bfloat16 if main_dtype(weights) == torch.bfloat16 else torch.float32


def _taken(model: Transformer, weights: Weights, cfg: EngineConfig) -> int:
    """Bytes of a process with everything but the experts: what it has now, and what comes."""
    shape, itemsize = model.cfg, model.compute_dtype.itemsize
    matrices = sum(
        weight.nbytes // weight.dtype.itemsize * itemsize
        for name, weight in weights.items()
        if ".experts." not in name and name != "wte.weight"
    )
    if shape.tie_word_embeddings:
        matrices += weights["wte.weight"].nbytes // weights["wte.weight"].dtype.itemsize * itemsize
    cache = cfg.cache_tokens * kv_bytes_per_token(shape, itemsize) * 32 / min(32, shape.head_dim)
    expert = 3 * shape.d_model * shape.ffn_hidden_size * itemsize
    assert shape.vocab_size is not None
    step = cfg.token_budget * (shape.moe_top_k + 4) * (shape.d_model + shape.ffn_hidden_size) * 4
    logits = LOGITS_ROWS * shape.vocab_size * 8
    return SPARE_BYTES + resident_bytes() + matrices + int(cache) + step + logits + (AT_ONCE + 6 * READERS) * expert


def resident_bytes() -> int:
    """Of this process, without the pages of files."""
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def _open(path: Path) -> tuple[ModelFolder, Tokenizer]:
    found = open_model(find_model(path))
    if found.tokenizer is None:
        raise InputError(
            f"{found.path} has no tokenizer.json; put the one there that the model was trained with, or "
            "`gristmill import` the directory, which makes the one of DBRX by itself"
        )
    tokenizer = Tokenizer.load(found.tokenizer)
    if found.cfg.vocab_size is None or tokenizer.vocab_size > found.cfg.vocab_size:
        raise InputError(
            f"{found.path}: the tokenizer has {tokenizer.vocab_size} ids, the model {found.cfg.vocab_size}; "
            "put the tokenizer there that the model was trained with"
        )
    return found, tokenizer


def find_model(path: Path) -> Path:
    """The directory with the weights: `path` itself, or the current checkpoint of a run or a training's folder.

    Raises InputError where there is no model, or several and nothing names one; Failure where it is damaged.
    """
    if (path / CONFIG).is_file() or (path / CONFIG_JSON).is_file():
        return path
    if (found := find_checkpoint(path)) is None:
        raise InputError(
            f"{path} holds no model; give a run folder with a checkpoint, a checkpoint, or a Hugging Face "
            "directory of a known layout"
        )
    return found
