"""Tests run the eager kernels on one thread: quick to start, the same on every machine."""

import pytest
import torch

from gristmill.kernels.compiled import use_compiled


@pytest.fixture(autouse=True)
def eager_kernels_on_one_thread() -> None:
    torch.set_num_threads(1)
    use_compiled(False)
