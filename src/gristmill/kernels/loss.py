"""Cross-entropy that never holds tokens x vocabulary: chunk by chunk, the gradient made in the forward pass.

Shapes: T tokens, D model, V vocabulary, C tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels import native
from gristmill.kernels.gpu import loss as gpu_loss
from gristmill.kernels.precision import upcast

CHUNK_LOGITS = 2**26  # logits of a chunk


def cross_entropy_reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The specification: each token's negative log-likelihood in nats, [T] in fp32."""
    return F.cross_entropy(upcast(hidden_TD @ weight_VD.to(hidden_TD.dtype).T), targets_T, reduction="none")


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the tokens' negative log-likelihoods, each of them [T] in fp32 without gradient).

    Raises ValueError where a target is no row of the weights (on CUDA it is not looked for: that would wait).
    """
    if not targets_T.is_cuda and len(targets_T):
        lowest, highest = (int(x) for x in targets_T.aminmax())
        if lowest < 0 or highest >= len(weight_VD):
            raise ValueError(f"targets from {lowest} to {highest}: a vocabulary of {len(weight_VD)} has 0 and up")
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T)


def chunk_tokens(vocab_size: int) -> int:
    """Return the tokens of a chunk. With fewer than 256, adding to the weight's gradient would dominate."""
    return min(max(CHUNK_LOGITS // vocab_size, 256), 2048)


def _loss_and_gradient(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the losses [C] and the gradient, which may take the place of the logits."""
    if logits_CV.is_cuda:
        return gpu_loss.loss_and_gradient(logits_CV, targets_C)
    if native.serves(logits_CV):
        return torch.ops.gristmill.cross_entropy(logits_CV, targets_C), logits_CV
    log_probs, row = upcast(logits_CV).log_softmax(1), torch.arange(len(targets_C), device=targets_C.device)
    nll = -log_probs[row, targets_C]
    grad = log_probs.exp_()
    grad[row, targets_C] -= 1
    return nll, grad.to(logits_CV.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T):  # type: ignore[no-untyped-def]
        weight = weight_VD.to(hidden_TD.dtype)
        sums = torch.promote_types(hidden_TD.dtype, torch.float32)
        nll_T = torch.empty(len(targets_T), dtype=sums, device=hidden_TD.device)
        dhidden_TD, dweight_VD = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD, dtype=sums)
        chunk = chunk_tokens(len(weight))
        for start in range(0, len(targets_T), chunk):
            rows = slice(start, start + chunk)
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
