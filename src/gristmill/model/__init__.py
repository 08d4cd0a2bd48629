"""The transformer: configuration, layers, counts. Imports torch and the kernels alone."""

from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Attend, Routing, Transformer, packed

__all__ = ["Attend", "ModelConfig", "Routing", "Transformer", "packed"]
