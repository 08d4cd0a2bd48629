"""The transformer: configuration, layers, initial weights, counts. Imports only torch and the kernels."""

from gristmill.model.config import ModelConfig
from gristmill.model.init import init_weights
from gristmill.model.transformer import Attend, Recompute, Routing, Transformer, packed

__all__ = ["Attend", "ModelConfig", "Recompute", "Routing", "Transformer", "init_weights", "packed"]
