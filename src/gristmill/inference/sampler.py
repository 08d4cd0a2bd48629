"""From logits to the next token. Pure: the same logits, settings and state of the generator give the same token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`temperature` 0 is greedy. `top_k` keeps the k most probable tokens, then `top_p` the fewest of the most
    probable ones whose probabilities sum to at least p (nucleus sampling, Holtzman et al., 2020, arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1, or null for all tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} must be from 0 to 2**63 - 1")

    def generator(self, sequence: int = 0) -> torch.Generator:
        """The source of chance for the sequence of this number in a batch."""
        return torch.Generator().manual_seed(self.seed + sequence)


def kept(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, most probable first, and their probabilities, which sum to 1 (float64).

    Of equal logits the lower id comes first. temperature must be positive.
    """
    order = logits_V.double().sort(descending=True, stable=True)
    ids = order.indices[: sampling.top_k]
    probs = (order.values[: sampling.top_k] / sampling.temperature).softmax(0)
    before = probs.cumsum(0) - probs
    count = int((before < sampling.top_p).sum()) if sampling.top_p < 1 else len(probs)
    return ids[:count], probs[:count] / probs[:count].sum()


def pick(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id. Takes one number from `generator`, or none when greedy."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    ids, probs = kept(logits_V.cpu(), sampling)
    chance = torch.rand((), generator=generator, dtype=torch.float64)
    index = int((probs.cumsum(0) <= chance).sum())
    return int(ids[min(index, len(ids) - 1)])  # rounding may leave the last cumulated sum below 1
