"""RMS normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467) over the last dimension.

PyTorch fuses it on GPUs and takes six passes on a CPU; its layer normalisation is fused on both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight, in x's dtype; weight [D] is an fp32 master."""
    if native.serves(x) and weight.dtype == torch.float32:
        if torch.is_grad_enabled():
            return _NativeRMSNorm.apply(x, weight, eps)
        return native.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)[0].view(x.shape)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class _NativeRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        x_ND = x.reshape(-1, x.shape[-1])
        out, inverse = torch.ops.gristmill.rms_norm(x_ND, weight, eps)
        ctx.save_for_backward(x_ND, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x_ND, weight, inverse = ctx.saved_tensors
        grad_ND = grad.reshape(x_ND.shape)
        dx, dweight = torch.ops.gristmill.rms_norm_backward(x_ND, weight, inverse, grad_ND)
        return dx.view(grad.shape), dweight, None
