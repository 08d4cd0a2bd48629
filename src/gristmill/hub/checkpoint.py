"""The model part of a checkpoint: `model.json` (the configuration) beside `model.safetensors` (fp32 masters)."""

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gristmill.errors import Failure, InputError
from gristmill.hub.tensors import read_tensors
from gristmill.model import ModelConfig

CONFIG = "model.json"
TOKENIZER = "tokenizer"  # directory inside a checkpoint, so that it can be used alone


def read_checkpoint(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The configuration, and the tensors one at a time under our own names."""
    file = path / CONFIG
    if not file.is_file():
        raise InputError(f"{path} is not a checkpoint: it has no {CONFIG}")
    try:
        cfg = ModelConfig(**json.loads(file.read_text()))
    except (ValueError, TypeError) as problem:
        raise Failure(f"{file} does not describe a model: {problem}") from None
    return cfg, read_tensors(path)
