"""From logits to the next token. Pure: the same logits, settings, history and number of chance give the same token.

The order is that of transformers: bias, penalties, grammar, temperature, top-k, top-p, min-p. The grammar comes before
all that keeps the most probable tokens, so those are the most probable of the allowed ones, and never none. The kept
tokens are transformers' own, up to rounding at an edge (it computes in fp32; here all past the grammar is float64), but
for one case: of equal logits on both sides of top-p's edge as many are kept, here those of lower ids, there what an
unstable sort says.

Shapes: V vocabulary.
"""

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gristmill.inference.errors import SettingError

# Parts of the largest probability. Those above are sorted, of the first that leaves enough: sorting all takes longest.
BOUNDS = (0.1, 0.01, 1e-3, 1e-4, 0.0)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`repetition_penalty` above 1 makes each token less probable that the sequence has already, prompt included (CTRL,
    Keskar et al., 2019, arXiv:1909.05858); 1 is none. `presence_penalty` is subtracted from the logit of each token
    made since the prompt, `frequency_penalty` as often as it was made. `logit_bias` is added to the ids' logits.
    `temperature` 0 is greedy. `top_k` keeps the k most probable tokens and those that equal the last of them, then
    `top_p` the fewest of the most probable ones whose probabilities sum to at least p (nucleus sampling, Holtzman et
    al., 2020, arXiv:1904.09751), then `min_p` those at least p times as probable as the first (Nguyen et al., 2024,
    arXiv:2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):  # below it, logits would overflow
            raise SettingError("temperature", f"temperature={self.temperature} must be 0 (greedy) or at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise SettingError("top_k", f"top_k={self.top_k} must be at least 1, or null for all tokens")
        if not 0 < self.top_p <= 1:
            raise SettingError("top_p", f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise SettingError("min_p", f"min_p={self.min_p} must be from 0 (all tokens) to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise SettingError(
                "repetition_penalty",
                f"repetition_penalty={self.repetition_penalty} must be from 0.01 to 100; 1 is no penalty",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -100 <= getattr(self, name) <= 100:
                raise SettingError(name, f"{name}={getattr(self, name)} must be from -100 to 100; 0 is no penalty")
        for id, bias in self.logit_bias.items():
            if id < 0 or not math.isfinite(bias):
                raise SettingError("logit_bias", f"logit_bias={{{id}: {bias}}} must be a finite number for a token id")
        if not 0 <= self.seed < 2**63:
            raise SettingError("seed", f"seed={self.seed} must be from 0 to 2**63 - 1")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class History:
    """What a sequence has already, as the penalties ask: [V], which ids; and how often each since the prompt."""

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.seen_V[list(prompt)] = True
        self.made_V = torch.zeros(vocab_size)

    def add(self, id: int) -> None:
        self.seen_V[id] = True
        self.made_V[id] += 1


def chance(seed: int, choice: int, position: int) -> float:
    """From 0 to below 1, for the token at this position of this answer: what else is computed beside it, and in which
    order, cannot change it."""
    drawn = hashlib.blake2b(struct.pack("<QQQ", seed, choice, position), digest_size=8).digest()
    return (int.from_bytes(drawn, "little") >> 11) / 2**53


def penalized(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """The logits; those of ids in `seen_V` (bool) are divided by the penalty when positive, multiplied when negative.

    In the logits' own precision, so that what ties in transformers ties here.
    """
    return torch.where(seen_V, torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def adjusted(
    logits_V: Tensor, sampling: Sampling, history: History | None = None, allowed_V: Tensor | None = None
) -> Tensor:
    """The logits with bias and penalties; minus infinity for ids that are not in `allowed_V` (bool)."""
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias))
        bias = torch.tensor(list(sampling.logit_bias.values()), dtype=logits_V.dtype)
        logits_V = logits_V.index_add(0, ids, bias)
    if sampling.has_penalties:
        assert history is not None
        if sampling.repetition_penalty != 1:
            logits_V = penalized(logits_V, history.seen_V, sampling.repetition_penalty)
        made_V = history.made_V
        logits_V = logits_V - sampling.presence_penalty * (made_V > 0) - sampling.frequency_penalty * made_V
    return logits_V if allowed_V is None else logits_V.masked_fill(~allowed_V, -torch.inf)


def kept(logits_V: Tensor, sampling: Sampling, chance: float | None = None) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, most probable first, and their probabilities, which sum to 1 (float64).

    Of equal logits the lower id comes first. temperature must be positive. logits_V: see `adjusted`. chance: what comes
    after the one that it draws may be left out, which spares sorting all of V.
    """
    values_V = logits_V.double()
    left_V = values_V > -torch.inf
    if sampling.top_k is not None and sampling.top_k < int(left_V.sum()):
        left_V = values_V >= values_V.topk(sampling.top_k).values[-1]
    probs_V = (values_V.masked_fill(~left_V, -torch.inf) / sampling.temperature).softmax(0)
    is_cut = sampling.top_p < 1 or sampling.min_p > 0
    mass = sampling.top_p if sampling.top_p < 1 else math.inf if is_cut or chance is None else chance
    for bound in BOUNDS:
        ids = (left_V & (probs_V >= bound * probs_V.max())).nonzero()[:, 0]
        if bound <= sampling.min_p or probs_V[ids].sum() > mass:
            break
    ids = ids[values_V[ids].sort(descending=True, stable=True).indices]
    probs, length = probs_V[ids], len(ids)
    if sampling.top_p < 1:
        length = int((probs.cumsum(0) - probs < sampling.top_p).sum())
    if sampling.min_p > 0:
        length = min(length, int((probs >= sampling.min_p * probs[0]).sum()))
    total = probs[:length].sum() if is_cut else probs_V.sum()
    return ids[:length], probs[:length] / total


def pick(
    logits_V: Tensor,
    sampling: Sampling,
    chance: float,
    history: History | None = None,
    allowed_V: Tensor | None = None,
) -> int:
    """The next token's id. chance: a number from 0 to below 1, of which the greedy choice has no need.

    history: needed with penalties, and not looked at without. allowed_V: see `adjusted`; None is all.
    """
    logits_V = adjusted(logits_V.cpu(), sampling, history, allowed_V)
    if sampling.temperature == 0:
        return int(logits_V.numpy().argmax())  # torch would wake its threads
    ids, probs = kept(logits_V, sampling, chance)
    index = int((probs.cumsum(0) <= chance).sum())
    return int(ids[min(index, len(ids) - 1)])  # rounding may leave the last cumulated sum below 1
