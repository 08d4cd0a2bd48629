"""Finds and loads a model wherever it stands: a run folder, a checkpoint, a Hugging Face directory."""

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
from gristmill.inference.engine import Engine
from gristmill.inference.generate import prompt_ids
from gristmill.inference.layers import NativeLayers
from gristmill.inference.memory import divide
from gristmill.inference.scheduler import EngineConfig
from gristmill.kernels import native
from gristmill.model import Transformer
from gristmill.tokenizer import Tokenizer


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
    memory_bytes: for the process: weights, cache and everything else except pages of files, which the system can drop.
    Experts that do not fit stay on disk. The cache has the tokens that `cfg` gives, else those that fit (see
    `memory.divide`). Raises as `load_model`, and InputError when the bound is too small.
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
        model = Transformer(found.cfg, compute_dtype).requires_grad_(False)
    check_names({name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}, found.weights)
    kept = {}
    for name, weight in found.weights.items():
        if name == "wte.weight" or "norm" in name or name.endswith("router_bias"):
            kept[name] = weight.load().to(compute_dtype if name == "wte.weight" else torch.float32)
    model.load_state_dict(kept, strict=False, assign=True)
    disk_bytes = None
    if memory_bytes is not None:
        cfg, disk_bytes = divide(model, found.weights, cfg, memory_bytes)
    return Engine(model, cfg, tokenizer, NativeLayers(model, found.weights, disk_bytes))


def _stored_dtype(weights: Weights) -> torch.dtype:
    if any(isinstance(weight, QuantizedWeight) for weight in weights.values()):
        return torch.bfloat16
    return torch.bfloat16 if main_dtype(weights) == torch.bfloat16 else torch.float32


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
