"""Clipping and rotary embedding on CUDA: one kernel each way. The gradient of a turn is the turn back."""

import torch
from torch import Tensor

from gristmill.kernels.gpu.lazy import kernels_for


def rotate(x_BSNC: Tensor, cos: Tensor, sin: Tensor, turned: int | None = None, clip: float | None = None) -> Tensor:
    """As `kernels.rotary.rotate`; x may be a view of a wider projection, which is not copied."""
    turned, clip = x_BSNC.shape[2] if turned is None else turned, float("inf") if clip is None else clip
    return _Rotate.apply(x_BSNC, cos, sin, turned, clip)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSNC, cos, sin, turned, clip):  # type: ignore[no-untyped-def]
        x_BSNC = _with_whole_heads(x_BSNC)
        shape = (*x_BSNC.shape[:2], 1, x_BSNC.shape[3] // 2)
        cos, sin = (angle.expand(shape).contiguous() for angle in (cos, sin))
        ctx.save_for_backward(cos, sin, *([x_BSNC] if clip < float("inf") else []))
        ctx.turned, ctx.clip = turned, clip
        return kernels_for(x_BSNC).rotate_heads(x_BSNC, cos, sin, turned, clip)

    @staticmethod
    def backward(ctx, grad_BSNC):  # type: ignore[no-untyped-def]
        cos, sin, *seen = ctx.saved_tensors
        grad_BSNC = _with_whole_heads(grad_BSNC)
        seen_BSNC = seen[0] if seen else grad_BSNC
        dx = kernels_for(grad_BSNC).rotate_heads(grad_BSNC, cos, sin, ctx.turned, ctx.clip, seen_BSNC)
        return dx, None, None, None, None


def _with_whole_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
