"""Which experts the tokens of a step go to: looked at from outside, in the steps that have someone who asks.

Shapes: T tokens of the step, K experts a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor

from gristmill.inference.requests import Chosen
from gristmill.model import Transformer
from gristmill.model.transformer import MoE

Routes: TypeAlias = list[tuple[Tensor, Tensor]]  # of each layer: weights [T, K], ids [T, K], on the CPU


@contextmanager
def watched(model: Transformer) -> Iterator[Routes]:
    """What each layer's router decides while it lasts, whatever computes the experts."""
    routes: Routes = []

    def note(_: object, given: tuple[Tensor, Tensor, Tensor]) -> None:
        routes.append((given[1].cpu(), given[2].cpu()))

    mixtures = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
    hooks = [mixture.experts.register_forward_pre_hook(note) for mixture in mixtures]
    try:
        yield routes
    finally:
        for hook in hooks:
            hook.remove()


def chosen(routes: Routes, row: int) -> tuple[Chosen, ...]:
    """Of one token, layer by layer."""
    return tuple(
        tuple(zip(ids_TK[row].tolist(), weights_TK[row].tolist(), strict=True)) for weights_TK, ids_TK in routes
    )
