"""The rates that a training is compared with: measured more than once, or from a data sheet."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gristmill.model import ModelConfig
from gristmill.train import figures as module
from gristmill.train.config import TrainConfig
from gristmill.train.display import share
from gristmill.train.figures import Figures
from gristmill.train.guard import Guard
from gristmill.train.machine import data_sheet_flops


def test_the_largest_of_several_measurements_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1e9, 3e9, 2e9])
    monkeypatch.setattr(module, "gemm_flops", lambda *_: next(rates))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batches: Any = SimpleNamespace(source_names=["notes"])
    model = ModelConfig(vocab_size=256)
    cfg = TrainConfig(steps=1)
    found = Figures(cfg, model, batches, Guard(cfg.guard), torch.float32, num_ranks=2)
    seen = [found.gemm_flops]
    for trained in (1.0, 60.0, 61.0, 120.0):  # seconds: a second after a measurement it is not worth another
        found.seconds = trained
        found.restart_clock()
        seen.append(found.gemm_flops)
    assert seen == [2e9, 2e9, 6e9, 6e9, 6e9]
    assert next(rates, None) is None


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),  # its data sheet states less
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_has_the_rate_of_its_own_data_sheet_or_none(
    name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert data_sheet_flops(torch.bfloat16) == flops
    assert data_sheet_flops(torch.float32) is None


def test_a_share_above_1_is_explained_where_it_is_shown() -> None:
    assert share(0.5) == "50%"
    assert share(1.28).startswith("128% (above 100%: ")
