"""Which experts a token goes to: the softmax of the router's logits, and the k of the largest probability.

Shapes: T tokens, E experts, K experts a token.
"""

import torch
from torch import Tensor

from gristmill.kernels import native


def route_reference(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, power: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification. Returns probabilities [T, E], and of the chosen experts the weights and the ids, [T, K].

    bias_E: it decides who is chosen, and not what the chosen count for. power: of the norm that divides the weights.
    """
    probs_TE = logits_TE.softmax(-1)
    if bias_E is None:
        weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    else:
        ids_TK = (probs_TE + bias_E).topk(top_k, dim=-1).indices
        weights_TK = probs_TE.gather(-1, ids_TK)
    if power is not None:
        weights_TK = weights_TK / weights_TK.norm(p=power, dim=-1, keepdim=True)
    return probs_TE, weights_TK, ids_TK


def route(logits_TE: Tensor, bias_E: Tensor | None, top_k: int, power: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one pass; of equal probabilities the first goes first."""
    if not native.serves(logits_TE) or logits_TE.dtype != torch.float32:
        return route_reference(logits_TE, bias_E, top_k, power)
    if torch.is_grad_enabled():
        return _NativeRoute.apply(logits_TE, bias_E, top_k, power)
    return native.route(logits_TE, bias_E, top_k, power or 0.0)


class _NativeRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, bias_E, top_k, power):  # type: ignore[no-untyped-def]
        probs_TE, weights_TK, ids_TK = torch.ops.gristmill.route(logits_TE, bias_E, top_k, power or 0.0)
        ctx.save_for_backward(probs_TE, weights_TK, ids_TK)
        ctx.power = power
        ctx.mark_non_differentiable(ids_TK)
        return probs_TE, weights_TK, ids_TK

    @staticmethod
    def backward(ctx, dprobs_TE, dweights_TK, _):  # type: ignore[no-untyped-def]
        probs_TE, weights_TK, ids_TK = ctx.saved_tensors
        if ctx.power is not None:  # w = p / |p|, of which dw = (dp - w sum(w^(power - 1) dp)) / |p|
            norm_T1 = probs_TE.gather(-1, ids_TK).norm(p=ctx.power, dim=-1, keepdim=True)
            along_T1 = (dweights_TK * weights_TK).sum(-1, keepdim=True)
            dweights_TK = (dweights_TK - weights_TK ** (ctx.power - 1) * along_T1) / norm_T1
        dprobs_TE = dprobs_TE.scatter_add(-1, ids_TK, dweights_TK)
        dlogits_TE = probs_TE * (dprobs_TE - (dprobs_TE * probs_TE).sum(-1, keepdim=True))
        return dlogits_TE, None, None, None
