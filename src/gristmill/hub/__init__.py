"""Model files in and out: our checkpoints, the published layouts (`layouts/`), GGUF, the hub.

May use the model, the tokenizer and artifacts. safetensors and JSON only: nothing here reads a pickle.
"""

from gristmill.hub.checkpoint import read_checkpoint
from gristmill.hub.published import read_published, write_published
from gristmill.hub.quantized import QuantizedWeight
from gristmill.hub.settings import SpecialIds
from gristmill.hub.tensors import Weight, Weights, assemble, in_memory, open_weights, write_weights

__all__ = [
    "QuantizedWeight",
    "SpecialIds",
    "Weight",
    "Weights",
    "assemble",
    "in_memory",
    "open_weights",
    "read_checkpoint",
    "read_published",
    "write_published",
    "write_weights",
]
