"""Finds and loads a model wherever it stands: a run folder, a checkpoint, a Hugging Face directory."""

from pathlib import Path

import torch

from gristmill import artifact
from gristmill.errors import InputError
from gristmill.hub import assemble, read_checkpoint, read_dbrx
from gristmill.hub.checkpoint import CONFIG, TOKENIZER
from gristmill.model import Transformer
from gristmill.tokenizer import Tokenizer


def load_model(path: Path, compute_dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """The model, ready for inference, and its tokenizer.

    Raises InputError when `path` holds no model, Failure when what it holds is damaged.
    """
    found = find_model(path)
    if (found / CONFIG).is_file():
        cfg, tensors = read_checkpoint(found)
        tokenizer = Tokenizer.load(found / TOKENIZER)
    else:
        cfg, tensors = read_dbrx(found)
        tokenizer = Tokenizer.load(found)
    if cfg.vocab_size is None or tokenizer.vocab_size > cfg.vocab_size:
        raise InputError(
            f"{found}: the tokenizer has {tokenizer.vocab_size} ids, the model {cfg.vocab_size}; "
            "put the tokenizer there that the model was trained with"
        )
    return assemble(cfg, tensors, compute_dtype), tokenizer


def find_model(path: Path) -> Path:
    """The directory with the weights: `path` itself, or the last checkpoint of a training stage or a run folder.

    A finished run names its checkpoint; of an unfinished one it is the checkpoint that was saved last.
    """
    if (path / CONFIG).is_file() or (path / "config.json").is_file():
        return path
    if (path / artifact.MANIFEST).is_file() and (trained := artifact.load(path).manifest["inputs"].get("train")):
        return find_model((path / trained["path"]).resolve())
    saved = [manifest for pattern in ("step-*", "train/*/step-*") for manifest in path.glob(f"{pattern}/manifest.json")]
    if not saved:
        raise InputError(
            f"{path} holds no model; give a run folder with a checkpoint, a checkpoint, or a Hugging Face dbrx "
            "directory"
        )
    return max(saved, key=lambda manifest: (manifest.stat().st_mtime_ns, manifest)).parent
