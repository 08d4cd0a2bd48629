"""Our model in float64 against a naive forward pass that was written separately: see numpy_reference."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from both import distance, load_ours, ours_packed, seen
from numpy_reference import Angles, dbrx_logits, fp32_angles, qwen3_moe_logits
from random_models import COUNT, LAYOUTS, Case, Layout, draw
from safetensors.torch import load_file

from gristmill.kernels.rotary import rotary_angles

# A frequency that two libraries round to neighbouring numbers turns a head by an angle that grows with the position.
SHORT = 24
SHORT_BOUND = 1e-6
SAME_ANGLES_BOUND = 1e-12


@pytest.mark.timeout(120 + COUNT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_logits_are_those_of_numpy(layout: Layout, tmp_path: Path) -> None:
    for seed in range(COUNT):
        error = against_numpy(draw(layout, seed, longest=SHORT), tmp_path / str(seed), fp32_angles)
        assert seen(f"{layout}: NumPy, float64", error) <= SHORT_BOUND, seed


@pytest.mark.timeout(120 + COUNT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_the_same_rotary_angles_they_are_equal_to_the_last_digits_at_any_length(
    layout: Layout, tmp_path: Path
) -> None:
    for seed in range(0, COUNT, 8):  # a long document takes NumPy a quarter of a second
        error = against_numpy(draw(layout, seed), tmp_path / str(seed), our_angles)
        assert seen(f"{layout}: NumPy, float64, same angles", error) <= SAME_ANGLES_BOUND, seed


@torch.no_grad()
def against_numpy(case: Case, folder: Path, angles: Angles) -> float:
    case.write(folder, case.model())
    documents = case.tokens()
    given = ours_packed(load_ours(folder, torch.float64), documents)
    assert given.dtype == torch.float64
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    naive = dbrx_logits if case.layout == "dbrx" else qwen3_moe_logits
    wanted = np.concatenate([naive(config, tensors, document, angles) for document in documents])
    return distance(given, torch.from_numpy(wanted))


def our_angles(position: int, pair: int, head_size: int, theta: float) -> tuple[float, float]:
    cos, sin = rotary_angles(torch.tensor([[position]]), head_size, theta)
    return float(cos[0, 0, 0, pair]), float(sin[0, 0, 0, pair])
