"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), rotate-half layout, computed in fp32.

Shapes: B sequences, S positions, N heads (queries, then keys, then values), C head size.
"""

import torch
from torch import Tensor

from gristmill.kernels import native
from gristmill.kernels.gpu import rotary as gpu_rotary
from gristmill.kernels.norm import rms_norm
from gristmill.kernels.precision import upcast


def rotary_angles(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, S, 1, head_dim / 2] in fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angles = positions_BS[..., None].float() * (1.0 / theta**exponents)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate_reference(x_BSNC: Tensor, cos: Tensor, sin: Tensor, turned: int, clip: float) -> Tensor:
    """The specification: clamp to ±clip, then turn each pair (c, c + C / 2) of the first heads by its angle."""
    x = upcast(x_BSNC.clamp(-clip, clip))
    a, b = x[:, :, :turned].chunk(2, dim=-1)
    return torch.cat([torch.cat([a * cos - b * sin, b * cos + a * sin], -1), x[:, :, turned:]], 2).to(x_BSNC.dtype)


def rotate(x_BSNC: Tensor, cos: Tensor, sin: Tensor, turned: int | None = None, clip: float | None = None) -> Tensor:
    """The same in one pass. None: all heads, no clipping."""
    if x_BSNC.is_cuda:
        return gpu_rotary.rotate(x_BSNC, cos, sin, turned, clip)
    turned, clip = x_BSNC.shape[2] if turned is None else turned, float("inf") if clip is None else clip
    if native.serves(x_BSNC):
        if torch.is_grad_enabled():
            return _NativeRotate.apply(x_BSNC, cos, sin, turned, clip)
        cos, sin = _of_tokens(cos, x_BSNC), _of_tokens(sin, x_BSNC)
        return native.rotate(_tokens(x_BSNC), cos, sin, turned, clip).view(x_BSNC.shape)
    return rotate_reference(x_BSNC, cos, sin, turned, clip)


def rotate_normed(
    x_BSNC: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    queries: int,
    keys: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, RMS-normed by weights [C] of their own and turned; and the values."""
    heads = queries, keys, x_BSNC.shape[2] - queries - keys
    if not torch.is_grad_enabled() and native.serves(x_BSNC) and q_weight.dtype == k_weight.dtype == torch.float32:
        angles = _of_tokens(cos, x_BSNC), _of_tokens(sin, x_BSNC)
        made = native.rotate_normed(_tokens(x_BSNC), q_weight, k_weight, eps, *angles, queries, keys)
        return made.view(x_BSNC.shape).split(heads, dim=2)
    q, k, v = x_BSNC.split(heads, dim=2)
    return rotate(rms_norm(q, q_weight, eps), cos, sin), rotate(rms_norm(k, k_weight, eps), cos, sin), v


class _NativeRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSNC, cos, sin, turned, clip):  # type: ignore[no-untyped-def]
        x_TNC, cos, sin = _tokens(x_BSNC), _of_tokens(cos, x_BSNC), _of_tokens(sin, x_BSNC)
        ctx.save_for_backward(cos, sin, *([x_TNC] if clip < float("inf") else []))
        ctx.turned, ctx.clip = turned, clip
        return torch.ops.gristmill.rotate(x_TNC, cos, sin, turned, clip).view(x_BSNC.shape)

    @staticmethod
    def backward(ctx, grad_BSNC):  # type: ignore[no-untyped-def]
        cos, sin, *clipped = ctx.saved_tensors
        grad_TNC = grad_BSNC.flatten(0, 1).contiguous()
        x_TNC = clipped[0] if clipped else grad_TNC  # any numbers: none of them is beyond infinity
        dx_TNC = torch.ops.gristmill.rotate_backward(x_TNC, cos, sin, ctx.turned, ctx.clip, grad_TNC)
        return dx_TNC.view(grad_BSNC.shape), None, None, None, None


def _of_tokens(angle: Tensor, x_BSNC: Tensor) -> Tensor:
    """[T, C / 2]"""
    B, S, _N, C = x_BSNC.shape
    return angle.expand(B, S, 1, C // 2).reshape(B * S, C // 2)


def _tokens(x_BSNC: Tensor) -> Tensor:
    """[T, N, C], where a token's heads lie together."""
    x_TNC = x_BSNC.flatten(0, 1)
    return x_TNC if x_TNC.stride()[1:] == (x_TNC.shape[2], 1) else x_TNC.contiguous()
