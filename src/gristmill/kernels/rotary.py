"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), rotate-half layout, computed in fp32."""

import torch
from torch import Tensor

from gristmill.kernels.compiled import fused
from gristmill.kernels.precision import upcast


def rotary_angles(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, S, 1, head_dim / 2] in fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angles = positions_BS[..., None].float() * (1.0 / theta**exponents)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


@fused
def rotate(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (c, c + head_dim / 2) of the last dimension by its position's angle."""
    a, b = upcast(x_BSHC).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BSHC.dtype)
