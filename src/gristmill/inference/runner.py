"""One forward pass of the model over the parts of a step: all their tokens in one row.

Shapes: T tokens of the row, D model, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gristmill.inference.layers import Layers, NativeLayers, layers_of
from gristmill.inference.paged import NativePaged, OneEach, paged_attention
from gristmill.inference.recording import NotRecordable, Recording, Scratch
from gristmill.inference.scheduler import Part
from gristmill.kernels import native
from gristmill.model import Transformer

LOGITS_ROWS = 256  # rows whose logits stand in memory at once
RECORD_AFTER = 6  # steps of so many sequences: to record takes as long as is saved in about as many


class Runner:
    """layers: None are those of the model's weights as they are now."""

    def __init__(self, model: Transformer, num_blocks: int, block_tokens: int, layers: Layers | None = None) -> None:
        self.model, self.layers = model, layers or layers_of(model)
        self.paged = paged_attention(model, num_blocks, block_tokens)
        self.longest = min(model.cfg.max_seq_len, num_blocks * block_tokens)  # sequence, in tokens
        self.device, self.threads = model.wte.weight.device, torch.get_num_threads()
        on_packed = isinstance(self.layers, NativeLayers) and isinstance(self.paged, NativePaged)
        self._own_threads = isinstance(self.layers, NativeLayers) and self.layers.is_complete
        self._can_record = on_packed and getattr(self.layers, "cache", None) is None
        self.scratch, self._decoding = Scratch(), dict[int, Decoding]()  # by the number of sequences
        self._steps: Counter[int] = Counter()
        self._logits_TV: Tensor | None = None  # of all rows of the last run, where they were made with it

    def run(self, parts: Sequence[Part], anew: bool = False) -> Tensor:
        """[T, D]: the hidden states of all tokens, part after part. They stand until the next run.

        anew: for who looks at the model while it computes; a recording passes it by.
        """
        torch.set_num_threads(self.threads)  # another number may round otherwise
        self._logits_TV = None
        if self._can_record and not anew and all(part.end - part.start == 1 for part in parts):
            decoding = self._decoding.get(len(parts)) or self._recorded(parts)
            if decoding is not None:
                with self._threads():
                    hidden_TD, self._logits_TV = decoding.run(parts)
                return hidden_TD
        tokens = torch.tensor([[id for part in parts for id in part.job.ids[part.start : part.end]]])
        positions = torch.tensor([[position for part in parts for position in range(part.start, part.end)]])
        with torch.inference_mode(), evaluating(self.model), self.layers.seated(), self._threads():
            hidden, _ = self.model(tokens.to(self.device), positions.to(self.device), self.paged.attend(parts))
        return hidden[0]

    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
        """[V] in fp32 on the CPU, of each of these rows of what `run` gave last. They stand until the next run."""
        if self._logits_TV is not None:
            yield from (self._logits_TV[row] for row in rows)
            return
        for first in range(0, len(rows), LOGITS_ROWS):
            with torch.inference_mode(), self._threads():
                logits_TV = self.layers.logits(hidden_TD[list(rows[first : first + LOGITS_ROWS])]).cpu()
            yield from logits_TV

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Native layers compute on threads of their own, between which PyTorch's small operations run on one."""
        if not self._own_threads:
            yield
            return
        torch.set_num_threads(1)
        try:
            with native.team(self.threads):
                yield
        finally:
            torch.set_num_threads(self.threads)

    def _recorded(self, parts: Sequence[Part]) -> "Decoding | None":
        self._steps[len(parts)] += 1
        if self._steps[len(parts)] <= RECORD_AFTER:
            return None
        try:
            self._decoding[len(parts)] = made = Decoding(self, parts)
            return made
        except NotRecordable:
            self._can_record = False
            return None


class Decoding:
    """Steps in which each of so many sequences has one token: the pass of the first one, made again."""

    @torch.inference_mode(False)
    def __init__(self, runner: Runner, parts: Sequence[Part]) -> None:
        assert isinstance(runner.paged, NativePaged)
        model, layers, count = runner.model, runner.layers, len(parts)
        self.where = OneEach(count, runner.longest, runner.paged.block_tokens)
        self.where.fill(parts)
        tokens, positions, *places = self.where.tensors
        attend = runner.paged.attend_at(*places)

        def computed() -> tuple[Tensor, Tensor]:
            hidden_TD = model(tokens, positions, attend)[0][0]
            return hidden_TD, layers.logits(hidden_TD)

        with torch.no_grad(), evaluating(model), layers.seated():
            self.recording = Recording(computed, self.where.tensors, runner.scratch)

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        """[T, D] hidden states and [T, V] logits in fp32."""
        self.where.fill(parts)
        with torch.inference_mode():
            self.recording.replay()
        return self.recording.made


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Without jitter; a model in training goes on training afterwards."""
    if not model.training:  # to say it to each module again takes longer than many a step
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
