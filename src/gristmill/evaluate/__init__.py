"""Measures a model on held-out documents, beside baselines on the same bytes; knows models through `Scorer` alone.

May use the corpus' Parquet files and the tokenizer; never the model or the engine that stands behind a scorer.
"""

from gristmill.evaluate.bits_per_byte import bits_per_byte
from gristmill.evaluate.build import build_evaluation
from gristmill.evaluate.config import EvaluateConfig
from gristmill.evaluate.documents import Document, read_documents
from gristmill.evaluate.scorer import Scorer, Window, windows

__all__ = [
    "Document",
    "EvaluateConfig",
    "Scorer",
    "Window",
    "bits_per_byte",
    "build_evaluation",
    "read_documents",
    "windows",
]
