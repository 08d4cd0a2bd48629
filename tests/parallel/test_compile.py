"""Compiled blocks compute the same; it takes a C++ compiler minutes to find out (`make stress`)."""

import os
import threading
from pathlib import Path

import pytest
import torch
from test_same_training import CFG, MODEL, batch_of, unequal
from torch import Tensor

from gristmill.parallel.apply import parallel_model
from gristmill.train.balance import Balance
from gristmill.train.gradients import Gradients

pytestmark = [
    pytest.mark.skipif("GRISTMILL_COMPILE" not in os.environ, reason="compiling takes minutes: make stress"),
    pytest.mark.timeout(1200),
]


def gradients_of(compile: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = parallel_model(MODEL, torch.float32, "cpu", None, "none", compile)
    unequal(model)
    assert Gradients(model, CFG, Balance(CFG, model), 2, Path("nowhere")).of(batch_of(0), threading.Event())
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def test_compiled_blocks_have_the_gradients_of_eager_ones() -> None:
    eager, compiled = gradients_of(False), gradients_of(True)
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(compiled[name], grad, rtol=1e-4, atol=1e-7) for name, grad in eager.items())
