"""Runs a trained model: an engine for many requests, sampling, scoring, loading.

It uses model, hub and evaluate's `Scorer`. An engine computes on modules of its own (`tree.py`) and never changes the
model that it was built from.
"""

from gristmill.inference.engine import Engine, Stream
from gristmill.inference.generate import complete, generate, stream
from gristmill.inference.grammar import ANY_OBJECT, Grammar, JsonSchema, Regex, read_schema
from gristmill.inference.load import find_model, load_engine, load_for_answer, load_model
from gristmill.inference.memory import parse_bytes
from gristmill.inference.requests import Piece, Request, Token
from gristmill.inference.sampler import Sampling
from gristmill.inference.scheduler import EngineConfig, QueueFull
from gristmill.inference.scorer import ModelScorer

__all__ = [
    "ANY_OBJECT",
    "Engine",
    "EngineConfig",
    "Grammar",
    "JsonSchema",
    "ModelScorer",
    "Piece",
    "QueueFull",
    "Regex",
    "Request",
    "Sampling",
    "Stream",
    "Token",
    "complete",
    "find_model",
    "generate",
    "load_engine",
    "load_for_answer",
    "load_model",
    "parse_bytes",
    "read_schema",
    "stream",
]
