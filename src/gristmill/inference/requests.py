"""What an engine is asked for and what it gives."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from gristmill.inference.errors import SettingError
from gristmill.inference.grammar import Grammar
from gristmill.inference.sampler import Sampling
from gristmill.inference.scheduler import Finish

Chosen: TypeAlias = tuple[tuple[int, float], ...]  # experts of one layer and their weights, the heaviest first
MAX_TOP = 20  # of the most probable tokens that may be asked for beside each


@dataclass(frozen=True, kw_only=True)
class Request:
    """prompt: ids. max_tokens: None is as many as there is room for. n: answers, which differ by chance alone.

    stop_ids end an answer, as does a text of `stop` in it; neither becomes part of its text. skip_control: control
    tokens add nothing to texts, as with `decode(ids, skip_special_tokens=True)` in transformers; else their names
    appear. grammar: the form that an answer
    has which ends by itself; one that ends with "length" or at something of `stop` is the beginning of such a text.
    logprobs: None, or how many of the most probable tokens are told beside each one's own log-probability, which is of
    the model's distribution, before bias, penalties and temperature. echo: the prompt comes first, as the beginning of
    each answer. experts: whether each token tells those of the pass that made it. priority: 0 goes before 1. tenant:
    prompts of one are not looked for among those of another.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    skip_control: bool = True
    grammar: Grammar | None = None
    logprobs: int | None = None
    echo: bool = False
    experts: bool = False
    priority: int = 0
    tenant: str = ""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise SettingError("max_tokens", f"max_tokens={self.max_tokens} must not be negative")
        if not 1 <= self.n <= 128:
            raise SettingError("n", f"n={self.n} must be from 1 to 128")
        if isinstance(self.stop, str) or not all(self.stop):
            raise SettingError("stop", f"stop={self.stop!r:.80} must be a tuple of texts that are not empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP:
            raise SettingError("logprobs", f"logprobs={self.logprobs} must be from 0 to {MAX_TOP}, or null for none")
        if not 0 <= self.priority <= 1000:
            raise SettingError("priority", f"priority={self.priority} must be from 0 (goes first) to 1000")

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens are looked at as if they had been made."""
        return self.echo and (self.logprobs is not None or self.experts)


class Token(NamedTuple):
    """`logprob`: None where it was not asked for, and of a prompt's first token. `top`: the most probable ids.

    `experts`: for each layer the experts, and their weights there, of the pass that predicted this token: the one that
    has the token before it as its input. Empty where they were not asked for, and of a prompt's first token.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    experts: tuple[Chosen, ...] = ()


class Piece(NamedTuple):
    """More of answer number `choice`. Only its last piece has `finish`; "error" means that a grammar exceeded the limit
    of work for one step in the middle of an answer.

    The pieces together have every token that was made, also a stop id and the tokens of a stop string, which add
    nothing to the text. A token comes with the piece that completes its text, or with the last piece.
    """

    choice: int
    text: str
    tokens: list[Token]
    finish: Finish | None
