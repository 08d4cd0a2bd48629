"""A model wherever it stands: a checkpoint, an imported model, or a Hugging Face directory of a known layout."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.current import TOKENIZER
from gristmill.errors import InputError
from gristmill.hub.checkpoint import CONFIG, read_checkpoint
from gristmill.hub.published import CONFIG_JSON, GENERATION_JSON, read_published
from gristmill.hub.settings import read_json
from gristmill.hub.tensors import Weights
from gristmill.model import ModelConfig

GENERATION = "generation.json"  # in our own directories: the settings that the model was published with
DOCUMENTS = "documents"  # directory of an imported model: its makers' license, notices and card
PULLED = "pulled.json"  # what `gristmill pull` says of the directory that it fetched
CARD = "README.md"
LICENSES = r"(?i:licen[sc]e|notice|use_policy)[^/]*"  # names of the papers that a license asks to be kept


@dataclass(frozen=True)
class ModelFolder:
    """`tokenizer`: the directory that holds its tokenizer.json; None when it came without one.

    `papers`: its makers' license, notices and card.
    """

    path: Path
    cfg: ModelConfig
    weights: Weights
    tokenizer: Path | None
    generation: Mapping[str, Any]
    papers: Sequence[Path]

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of its weights by the form in which they are stored, the largest first."""
        sizes = Counter[str]()
        for weight in self.weights.values():
            form, num_bytes = weight.stored
            sizes[form] += num_bytes
        return dict(sizes.most_common())


def open_model(path: Path) -> ModelFolder:
    """Read what stands in `path`; no weight is loaded yet.

    Raises InputError when it holds no model of a known layout, Failure when what it holds is damaged.
    """
    if (path / CONFIG).is_file():
        cfg, weights = read_checkpoint(path)
        tokenizer, generation, documents = path / TOKENIZER, path / GENERATION, path / DOCUMENTS
    elif (path / CONFIG_JSON).is_file():
        cfg, weights = read_published(path)
        tokenizer, generation, documents = path, path / GENERATION_JSON, path
    else:
        raise InputError(f"{path} holds no model: it has neither {CONFIG} nor {CONFIG_JSON}")
    return ModelFolder(
        path,
        cfg,
        weights,
        tokenizer if (tokenizer / "tokenizer.json").is_file() else None,
        read_json(generation) or {},
        papers(documents),
    )


def name_of(path: Path) -> str:
    """Return the last part of a path as text; bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(path.resolve().name).decode(errors="replace")


def papers(folder: Path) -> list[Path]:
    """License, notices and card of a published directory."""
    wanted = re.compile(rf"{LICENSES}|{re.escape(CARD)}")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in found if wanted.fullmatch(file.name) and file.is_file()]
