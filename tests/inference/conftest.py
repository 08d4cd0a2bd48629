from collections.abc import Callable
from typing import Any

import pytest
import torch

from gristmill.model import ModelConfig, Transformer


@pytest.fixture
def tiny() -> Callable[..., Transformer]:
    """A random model whose weights are large enough that its predictions differ clearly."""

    def make(**changes: Any) -> Transformer:
        shape = {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "kv_n_heads": 2,
            "ffn_hidden_size": 24,
            "vocab_size": 300,
            "max_seq_len": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "initializer_range": 0.2,
        }
        torch.manual_seed(0)
        return Transformer(ModelConfig(**{**shape, **changes})).eval()

    return make
