"""From logits to the next token. Pure: the same logits, settings and state of the generator give the same token.

The order is that of transformers: repetition penalty, temperature, top-k, top-p. The kept tokens are its own too, up to
rounding at an edge (it computes in fp32; here all after the penalty is float64), but for one case: of equal logits
that lie on both sides of top-p's edge as many are kept, here those of lower ids, there what an unstable sort says.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`repetition_penalty` above 1 makes each token less probable that the sequence has already, prompt included (CTRL,
    Keskar et al., 2019, arXiv:1909.05858); 1 is none. `temperature` 0 is greedy. `top_k` keeps the k most probable
    tokens and those that equal the last of them, then `top_p` the fewest of the most probable ones whose probabilities
    sum to at least p (nucleus sampling, Holtzman et al., 2020, arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):  # below it, logits would overflow
            raise InputError(f"temperature={self.temperature} must be 0 (greedy) or at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1, or null for all tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise InputError(f"repetition_penalty={self.repetition_penalty} must be from 0.01 to 100; 1 is no penalty")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} must be from 0 to 2**63 - 1")

    def generator(self, sequence: int = 0) -> torch.Generator:
        """The source of chance for the sequence of this number in a batch."""
        return torch.Generator().manual_seed(self.seed + sequence)


def penalized(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """The logits; those of ids in `seen_V` (bool) are divided by the penalty when positive, multiplied when negative.

    In the logits' own precision, so that what ties in transformers ties here.
    """
    return torch.where(seen_V, torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def kept(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, most probable first, and their probabilities, which sum to 1 (float64).

    Of equal logits the lower id comes first. temperature must be positive. The repetition penalty is not applied here.
    """
    order = logits_V.double().sort(descending=True, stable=True)
    values = order.values
    if sampling.top_k is not None and sampling.top_k < len(values):
        values = values[values >= values[sampling.top_k - 1]]
    probs = (values / sampling.temperature).softmax(0)
    before = probs.cumsum(0) - probs
    count = int((before < sampling.top_p).sum()) if sampling.top_p < 1 else len(probs)
    return order.indices[:count], probs[:count] / probs[:count].sum()


def pick(logits_V: Tensor, sampling: Sampling, generator: torch.Generator, seen_V: Tensor | None = None) -> int:
    """The next token's id. Takes one number from `generator`, or none when greedy.

    seen_V: which ids the sequence has already; needed with a repetition penalty, and not looked at without one.
    """
    if sampling.repetition_penalty != 1:
        assert seen_V is not None
        logits_V = penalized(logits_V, seen_V, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    ids, probs = kept(logits_V.cpu(), sampling)
    chance = torch.rand((), generator=generator, dtype=torch.float64)
    index = int((probs.cumsum(0) <= chance).sum())
    return int(ids[min(index, len(ids) - 1)])  # rounding may leave the last cumulated sum below 1
