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
from gristmill.inference.parameters import Bounds, Parameter, declared, parameters_of

# Parts of the largest probability. Those above are sorted, of the first that leaves enough: sorting all takes longest.
BOUNDS = (0.1, 0.01, 1e-3, 1e-4, 0.0)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the table of sampling parameters.

    The penalties come first: repetition (CTRL, Keskar et al., 2019, arXiv:1909.05858) by a factor, then presence and
    frequency as in OpenAI's API. `logit_bias` is added to the logits of token ids. `top_k` keeps the k most probable
    tokens and those that equal the last of them; None keeps all. Then `top_p` keeps the fewest of the most probable
    tokens whose probabilities sum to at least p (nucleus sampling, Holtzman et al., 2020, arXiv:1904.09751), and
    `min_p` those at least p times as probable as the first (Nguyen et al., 2024, arXiv:2407.01082).
    """

    temperature: float = declared(
        Parameter(
            help="Values above 1 flatten the distribution; 0 always takes the most probable token (greedy).",
            default=1.0,
            bounds=Bounds(low=1e-6, or_zero=True, zero="greedy"),  # below 1e-6, logits would overflow
            api=Bounds(low=0, high=2, zero="greedy"),
            generate=0.8,
            is_published=True,
        )
    )
    top_p: float = declared(
        Parameter(
            help="Keep the most probable tokens up to this probability mass.",
            default=1.0,
            bounds=Bounds(low=0, high=1, excludes_low=True),
            generate=0.95,
            is_published=True,
            needs_sampling=True,
        )
    )
    top_k: int | None = declared(
        Parameter(
            help="Keep this many of the most probable tokens; 0 keeps all.",
            default=0,
            bounds=Bounds(low=0, zero="all tokens"),
            kind=int,
            is_published=True,
            needs_sampling=True,
        ),
        None,
    )
    min_p: float = declared(
        Parameter(
            help="Keep tokens at least this times as probable as the most probable one.",
            default=0.0,
            bounds=Bounds(low=0, high=1, zero="all tokens"),
            is_published=True,
            needs_sampling=True,
        )
    )
    seed: int = declared(
        Parameter(
            help="The same seed gives the same answer, regardless of the batch.",
            default=None,
            bounds=Bounds(low=0, high=2**63 - 1),
            api=Bounds(low=-(2**63), high=2**63 - 1),
            kind=int,
            generate=0,
        ),
        0,
    )
    repetition_penalty: float = declared(
        Parameter(
            help="Values above 1 discourage tokens that the prompt or the answer contains already.",
            default=1.0,
            bounds=Bounds(low=0.01, high=100),
            is_published=True,
        )
    )
    presence_penalty: float = declared(
        Parameter(
            help="Positive values discourage tokens that the answer contains already.",
            default=0.0,
            bounds=Bounds(low=-100, high=100, zero="no penalty"),
            api=Bounds(low=-2, high=2, zero="no penalty"),
            in_generate=False,
        )
    )
    frequency_penalty: float = declared(
        Parameter(
            help="Positive values discourage tokens in proportion to how often the answer contains them.",
            default=0.0,
            bounds=Bounds(low=-100, high=100, zero="no penalty"),
            api=Bounds(low=-2, high=2, zero="no penalty"),
            in_generate=False,
        )
    )
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in PARAMETERS.items():
            value = getattr(self, name)
            if value is not None and not parameter.bounds.allow(value):
                raise SettingError(name, f"{name}={value} must be {parameter.bounds}")
        if self.top_k == 0:
            raise SettingError("top_k", "top_k=0 must be at least 1, or None for all tokens")
        for id, bias in self.logit_bias.items():
            if id < 0 or not math.isfinite(bias):
                raise SettingError("logit_bias", f"logit_bias={{{id}: {bias}}} must be a finite number for a token id")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


PARAMETERS = parameters_of(Sampling)


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
