"""Cross-entropy that never holds tokens x vocabulary: chunk by chunk, the gradient made in the forward pass.

Shapes: T tokens, D model, V vocabulary, C tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.compiled import fused
from gristmill.kernels.precision import upcast

CHUNK_TOKENS = 1024


def cross_entropy_reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The specification: each token's negative log-likelihood in nats, [T] in fp32."""
    return F.cross_entropy(upcast(hidden_TD @ weight_VD.to(hidden_TD.dtype).T), targets_T, reduction="none")


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the tokens' negative log-likelihoods, each of them [T] in fp32 without gradient)."""
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T)


@fused
def _loss_and_gradient(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    logits = upcast(logits_CV)
    highest = logits.amax(1, keepdim=True)
    exp = (logits - highest).exp()
    total = exp.sum(1, keepdim=True)
    hit = torch.arange(logits.shape[1], device=logits.device)[None] == targets_C[:, None]
    nll = (total.log() + highest).squeeze(1) - torch.where(hit, logits, 0.0).sum(1)
    return nll, (exp / total - hit.to(logits.dtype)).to(logits_CV.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T):  # type: ignore[no-untyped-def]
        weight = weight_VD.to(hidden_TD.dtype)
        sums = torch.promote_types(hidden_TD.dtype, torch.float32)
        nll_T = torch.empty(len(targets_T), dtype=sums, device=hidden_TD.device)
        dhidden_TD, dweight_VD = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD, dtype=sums)
        for start in range(0, len(targets_T), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            nll_T[rows], dlogits_CV = _loss_and_gradient(hidden_TD[rows] @ weight.T, targets_T[rows])
            torch.mm(dlogits_CV, weight, out=dhidden_TD[rows])
            dweight_VD += dlogits_CV.T @ hidden_TD[rows]
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        ctx.mark_non_differentiable(nll_T)
        return nll_T.sum(), nll_T

    @staticmethod
    def backward(ctx, grad, _grad_nll):  # type: ignore[no-untyped-def]
        dhidden_TD, dweight_VD = ctx.saved_tensors
        return dhidden_TD * grad.to(dhidden_TD.dtype), dweight_VD * grad, None
