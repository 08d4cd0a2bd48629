"""The one door between evaluation and whatever runs the model: the built-in engine, or a client of a server."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol


class Scorer(Protocol):
    def loglikelihood(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """For each sequence, the total log-probability in nats of all its tokens but the first.

        The caller puts `<|endoftext|>` first, so that a document is scored from its first token on. Sequences
        longer than the model's context are scored in `windows`.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """New ids for each prompt, without the id that stopped it. Temperature 0 is greedy."""
        ...


class Window(NamedTuple):
    """Inputs `sequence[start:end]`; the targets of inputs from `first` on (absolute index) count."""

    start: int
    end: int
    first: int


def windows(num_inputs: int, length: int) -> Iterator[Window]:
    """Cover `num_inputs` inputs with windows of at most `length` that overlap by half; each target counts once.

    The first window counts whole. In every later one only the second half counts, so each of its predictions
    sees at least length - length // 2 earlier tokens. The last window may be short.
    """
    stride = length // 2
    if num_inputs > 0:
        yield Window(0, min(length, num_inputs), 0)
    start = stride
    while start + length - stride < num_inputs:
        yield Window(start, min(start + length, num_inputs), start + length - stride)
        start += stride
