"""Compiled blocks compute the same, with recomputation too. Here torch's tracing, without the C++ that it would write;
`make stress` has that as well, which takes minutes."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_same_training import CFG, MODEL, batch_of, unequal
from torch import Tensor
from torch._dynamo.utils import counters

from gristmill.inference.scorer import ModelScorer
from gristmill.model import init_weights
from gristmill.parallel.apply import build_model
from gristmill.train.balance import Balance
from gristmill.train.gradients import Gradients

BACKENDS = ["aot_eager", *(["inductor"] if "GRISTMILL_COMPILE" in os.environ else [])]


def gradients_of(recompute: Any, compile: bool) -> dict[str, Tensor]:
    model = init_weights(build_model(MODEL, torch.float32, "cpu", None, recompute, compile), seed=0)
    unequal(model)
    Gradients(model, CFG, Balance(CFG, model), 2, Path("nowhere")).of(batch_of(0))
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def test_a_compiled_model_is_scored_as_an_eager_one_and_compiles_nothing_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    sequences = [[1, 2, 3, 4, 5], [7, 6, 5, 4, 3, 2, 1, 0]]
    scores = []
    for compile in (False, True):
        model = init_weights(build_model(MODEL, torch.float32, "cpu", compile=compile), seed=0)
        unequal(model)
        scores.append(ModelScorer(model.train(), 8).loglikelihood(sequences))
    assert scores[0] == scores[1]
    assert not counters["stats"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_have_the_gradients_of_eager_ones(
    recompute: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = gradients_of(recompute, False), gradients_of(recompute, True)
    assert counters["stats"]["unique_graphs"] >= 3, "attention, router and what follows the experts are compiled"
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(compiled[name], grad, rtol=1e-4, atol=1e-7) for name, grad in eager.items())
