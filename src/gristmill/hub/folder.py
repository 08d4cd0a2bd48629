"""A model wherever it stands: a checkpoint, an imported model, or a Hugging Face directory of a known layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.errors import InputError
from gristmill.hub.checkpoint import CONFIG, TOKENIZER, read_checkpoint
from gristmill.hub.published import CONFIG_JSON, GENERATION_JSON, read_json, read_published
from gristmill.hub.tensors import Weights
from gristmill.model import ModelConfig

GENERATION = "generation.json"  # in our own directories: the settings that the model was published with
DOCUMENTS = "documents"  # directory of an imported model: its makers' license, notices and card
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class ModelFolder:
    """`tokenizer`: the directory that holds its tokenizer.json; None when it came without one."""

    path: Path
    cfg: ModelConfig
    weights: Weights
    tokenizer: Path | None
    generation: Mapping[str, Any]


def open_model(path: Path) -> ModelFolder:
    """Read what stands in `path`; no weight is loaded yet.

    Raises InputError when it holds no model of a known layout, Failure when what it holds is damaged.
    """
    if (path / CONFIG).is_file():
        cfg, weights = read_checkpoint(path)
        tokenizer, generation = path / TOKENIZER, path / GENERATION
    elif (path / CONFIG_JSON).is_file():
        cfg, weights = read_published(path)
        tokenizer, generation = path, path / GENERATION_JSON
    else:
        raise InputError(f"{path} holds no model: it has neither {CONFIG} nor {CONFIG_JSON}")
    return ModelFolder(
        path,
        cfg,
        weights,
        tokenizer if (tokenizer / "tokenizer.json").is_file() else None,
        read_json(generation) or {},
    )
