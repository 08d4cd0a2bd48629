"""Cross-entropy of a chunk on CUDA: one program a row, a softmax that runs along the vocabulary in blocks."""

from torch import Tensor

from gristmill.kernels.gpu.lazy import kernels_for


def loss_and_gradient(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihoods [C] in fp32, gradient of the logits [C, V] in their dtype).

    The gradient takes the logits' place where these are contiguous: they must not be needed again.
    """
    dlogits_CV = logits_CV.contiguous()
    return kernels_for(dlogits_CV).loss_in_place(dlogits_CV, targets_C.contiguous()), dlogits_CV
