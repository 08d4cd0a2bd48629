"""The precision in which sums, exponentials and probabilities are taken."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in fp32; in float64 where it already is, so that a model in float64 is one throughout (rotary angles aside)."""
    return x if x.dtype == torch.float64 else x.float()
