"""Runs a trained model: an engine for many requests, sampling, scoring, loading. All of it stands behind `attend`.

May use the model, hub and evaluate's `Scorer`; it changes nothing in them.
"""

from gristmill.inference.engine import Engine, Stream
from gristmill.inference.generate import complete, generate, stream
from gristmill.inference.load import find_model, load_engine, load_model
from gristmill.inference.requests import Piece, Request, Token
from gristmill.inference.sampler import Sampling
from gristmill.inference.scheduler import EngineConfig, QueueFull
from gristmill.inference.scorer import ModelScorer

__all__ = [
    "Engine",
    "EngineConfig",
    "ModelScorer",
    "Piece",
    "QueueFull",
    "Request",
    "Sampling",
    "Stream",
    "Token",
    "complete",
    "find_model",
    "generate",
    "load_engine",
    "load_model",
    "stream",
]
