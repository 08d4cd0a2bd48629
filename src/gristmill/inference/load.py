"""Finds and loads a model wherever it stands: a run folder, a checkpoint, a Hugging Face directory."""

from pathlib import Path

import torch

from gristmill import artifact
from gristmill.errors import InputError
from gristmill.hub import assemble
from gristmill.hub.checkpoint import CONFIG
from gristmill.hub.folder import open_model
from gristmill.hub.published import CONFIG_JSON
from gristmill.model import Transformer
from gristmill.tokenizer import Tokenizer


def load_model(path: Path, compute_dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """The model, ready for inference, and its tokenizer.

    Raises InputError when `path` holds no model, Failure when what it holds is damaged.
    """
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
    return assemble(found.cfg, found.weights, compute_dtype), tokenizer


def find_model(path: Path) -> Path:
    """The directory with the weights: `path` itself, or the last checkpoint of a training stage or a run folder.

    A finished run names its checkpoint; of an unfinished one it is the checkpoint that was saved last.
    """
    if (path / CONFIG).is_file() or (path / CONFIG_JSON).is_file():
        return path
    if (path / artifact.MANIFEST).is_file() and (trained := artifact.load(path).manifest["inputs"].get("train")):
        return find_model((path / trained["path"]).resolve())
    saved = [manifest for pattern in ("step-*", "train/*/step-*") for manifest in path.glob(f"{pattern}/manifest.json")]
    if not saved:
        raise InputError(
            f"{path} holds no model; give a run folder with a checkpoint, a checkpoint, or a Hugging Face "
            "directory of a known layout"
        )
    return max(saved, key=lambda manifest: (manifest.stat().st_mtime_ns, manifest)).parent
