"""Runs a trained model: key/value cache, sampling, generation, scoring, loading. All of it stands behind `attend`.

May use the model, hub and evaluate's `Scorer`; it changes nothing in them.
"""

from gristmill.inference.generate import decode, generate, stream
from gristmill.inference.load import find_model, load_model
from gristmill.inference.sampler import Sampling
from gristmill.inference.scorer import ModelScorer

__all__ = ["ModelScorer", "Sampling", "decode", "find_model", "generate", "load_model", "stream"]
