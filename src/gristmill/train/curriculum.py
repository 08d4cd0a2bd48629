"""Turns the weights of a corpus's sources into the curriculum: phases of training with a mix of sources each."""

import typing

from gristmill.corpus.config import CorpusConfig
from gristmill.streaming.order import MixPhase

# (the fraction of training from which on it holds, (weight at that point, weight at the next change))
Changes: typing.TypeAlias = list[tuple[float, tuple[float, float]]]


def curriculum_of(cfg: CorpusConfig) -> tuple[MixPhase, ...]:
    """The mix over training that the sources' weights describe: a new phase wherever a weight changes."""
    changes = {name: _changes(source.weight) for name, source in cfg.sources.items()}
    starts = sorted({start for its in changes.values() for start, _ in its})
    phases = []
    for start, until in zip(starts, [*starts[1:], 1.0], strict=True):
        mix = {name: _between(its, start, start) for name, its in changes.items()}
        to = {name: _between(its, start, until) for name, its in changes.items()}
        phases.append(MixPhase(until=until, mix=mix, to=to if to != mix else None))
    return tuple(phases)


def _changes(weight: float | dict[float, float | tuple[float, float]]) -> Changes:
    steps = weight if isinstance(weight, dict) else {0.0: weight}
    return sorted((start, its if isinstance(its, tuple) else (its, its)) for start, its in steps.items())


def _between(changes: Changes, start: float, fraction: float) -> float:
    """A source's weight at a fraction of training, by the change that holds from `start` on."""
    at = max(i for i, (change, _) in enumerate(changes) if change <= start)
    first, (low, high) = changes[at]
    last = changes[at + 1][0] if at + 1 < len(changes) else 1.0
    share = (fraction - first) / (last - first)
    return low if low == high else (1 - share) * low + share * high  # a constant weight, to the last bit
