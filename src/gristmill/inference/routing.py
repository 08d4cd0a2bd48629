"""Which experts the tokens of a step go to, in the steps in which a request asks for it.

Shapes: T tokens of the step, K experts a token.
"""

from typing import TypeAlias

from torch import Tensor

from gristmill.inference.requests import Chosen
from gristmill.model.transformer import Observe

Routes: TypeAlias = list[tuple[Tensor, Tensor]]  # of each layer: weights [T, K], ids [T, K], on the CPU


def append_to(routes: Routes) -> Observe:
    """Append each layer's routing."""
    return lambda weights_TK, ids_TK: routes.append((weights_TK.cpu(), ids_TK.cpu()))


def chosen(routes: Routes, row: int) -> tuple[Chosen, ...]:
    """Of one token, layer by layer."""
    return tuple(
        tuple(zip(ids_TK[row].tolist(), weights_TK[row].tolist(), strict=True)) for weights_TK, ids_TK in routes
    )
