"""Model files in and out: our checkpoints, and the Hugging Face `dbrx` layout with its tokenizer and model card.

May use the model, the tokenizer and artifacts. safetensors and JSON only: nothing here reads a pickle.
"""

from gristmill.hub.checkpoint import read_checkpoint
from gristmill.hub.dbrx import read_dbrx, write_dbrx
from gristmill.hub.tensors import assemble, read_tensors, write_tensors

__all__ = [
    "assemble",
    "read_checkpoint",
    "read_dbrx",
    "read_tensors",
    "write_dbrx",
    "write_tensors",
]
