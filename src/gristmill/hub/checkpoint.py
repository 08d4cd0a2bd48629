"""The model part of a checkpoint: `model.json` (the configuration) beside `model.safetensors` under our own names."""

from pathlib import Path

from gristmill.errors import Failure, InputError
from gristmill.hub.mapping import shapes
from gristmill.hub.settings import read_json
from gristmill.hub.tensors import Weights, check_names, open_weights
from gristmill.model import ModelConfig

CONFIG = "model.json"


def read_checkpoint(path: Path) -> tuple[ModelConfig, Weights]:
    """The configuration, and the weights under our own names, not loaded yet."""
    file = path / CONFIG
    parsed = read_json(file)
    if parsed is None:
        raise InputError(f"{path} is not a checkpoint: it has no {CONFIG}")
    try:
        cfg = ModelConfig(**parsed)
    except (ValueError, TypeError) as problem:
        raise Failure(f"{file} does not describe a model: {problem}") from None
    weights = open_weights(path)
    if cfg.vocab_size is None or cfg.n_layers > len(weights):
        raise Failure(
            f"{file} does not describe the weights beside it: vocab_size={cfg.vocab_size}, {cfg.n_layers} layers"
        )
    expected = shapes(cfg)
    check_names(expected, weights)
    return cfg, {name: weights[name] for name in expected}
