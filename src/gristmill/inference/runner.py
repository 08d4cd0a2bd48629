"""One forward pass of the model over the parts of a step: all their tokens in one row.

Shapes: T tokens of the row, D model, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from gristmill.inference.layers import NativeLayers, layers_of
from gristmill.inference.paged import NativePaged, OneEach, paged_attention
from gristmill.inference.recording import NotRecordable, Recording, Scratch
from gristmill.inference.scheduler import Part
from gristmill.inference.tree import Layers
from gristmill.kernels import native
from gristmill.model import Transformer
from gristmill.model.transformer import Observe

LOGITS_ROWS = 256  # rows whose logits are in memory at the same time
RECORD_AFTER = 6  # steps with the same number of sequences: recording takes as long as about so many of them save


class Runner:
    """Computes with `layers` (None: `layers_of(model)`), one thread at a time, on as many threads as PyTorch had in the
    thread that constructed it."""

    def __init__(self, model: Transformer, num_blocks: int, block_tokens: int, layers: Layers | None = None) -> None:
        self.layers = layers or layers_of(model)
        self.paged = paged_attention(model, num_blocks, block_tokens)
        self.longest = min(model.cfg.max_seq_len, num_blocks * block_tokens)  # sequence, in tokens
        self.device, self.threads = model.wte.weight.device, torch.get_num_threads()
        self.kernels = native.in_use()
        self._can_record = (
            isinstance(self.layers, NativeLayers) and self.layers.cache is None and isinstance(self.paged, NativePaged)
        )
        self.scratch, self._decoding = Scratch(), dict[int, Decoding]()  # by the number of sequences
        self._steps: Counter[int] = Counter()
        self._logits_TV: Tensor | None = None  # of all rows of the last run, if a recording made them

    def refresh(self) -> None:
        """Take the model's weights as they are now."""
        self._decoding.clear()  # recordings hold the old weights
        self._steps.clear()
        self._logits_TV = None
        self.layers.refresh()

    def run(self, parts: Sequence[Part], observe: Observe | None = None) -> Tensor:
        """[T, D]: the hidden states of all tokens, part after part. They are valid until the next run.

        observe: sees each layer's routing, in a pass that no recording replaces.
        """
        assert native.in_use() == self.kernels, "kernels are chosen before an engine is built, see native.use"
        self._logits_TV = None
        if self._can_record and observe is None and all(part.end - part.start == 1 for part in parts):
            decoding = self._decoding.get(len(parts)) or self._record(parts)
            if decoding is not None:
                with self._threads():
                    hidden_TD, self._logits_TV = decoding.run(parts)
                return hidden_TD
        tokens = torch.tensor([[id for part in parts for id in part.job.ids[part.start : part.end]]])
        positions = torch.tensor([[position for part in parts for position in range(part.start, part.end)]])
        with torch.inference_mode(), self._threads():
            attend = self.paged.attend(parts)
            hidden, _ = self.layers.tree(tokens.to(self.device), positions.to(self.device), attend, observe)
        return hidden[0]

    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
        """[V] in fp32 on the CPU, of each of these rows of the last `run`'s result. Valid until the next run."""
        if self._logits_TV is not None:
            yield from (self._logits_TV[row] for row in rows)
            return
        for first in range(0, len(rows), LOGITS_ROWS):
            with torch.inference_mode(), self._threads():
                logits_TV = self.layers.logits(hidden_TD[list(rows[first : first + LOGITS_ROWS])]).cpu()
            yield from logits_TV

    def _threads(self) -> AbstractContextManager[None]:
        """Another number of threads may round differently, except on the team of the native layers."""
        return native.team(self.threads) if isinstance(self.layers, NativeLayers) else torch_threads(self.threads)

    def _record(self, parts: Sequence[Part]) -> "Decoding | None":
        self._steps[len(parts)] += 1
        if self._steps[len(parts)] <= RECORD_AFTER:
            return None
        try:
            self._decoding[len(parts)] = decoding = Decoding(self, parts)
            return decoding
        except NotRecordable:
            self._can_record = False
            return None


class Decoding:
    """Steps in which each of a number of sequences has one token: a recording of the first one's pass, replayed."""

    @torch.inference_mode(False)
    def __init__(self, runner: Runner, parts: Sequence[Part]) -> None:
        assert isinstance(runner.paged, NativePaged)
        layers, count = runner.layers, len(parts)
        self.where = OneEach(count, runner.longest, runner.paged.block_tokens)
        self.where.fill(parts)
        tokens, positions, *places = self.where.tensors
        attend = runner.paged.attend_at(*places)

        def computed() -> tuple[Tensor, Tensor]:
            hidden_TD = layers.tree(tokens, positions, attend)[0][0]
            return hidden_TD, layers.logits(hidden_TD)

        with torch.no_grad():
            self.recording = Recording(computed, self.where.tensors, runner.scratch)

    def run(self, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        """[T, D] hidden states and [T, V] logits in fp32."""
        self.where.fill(parts)
        with torch.inference_mode():
            self.recording.replay()
        return self.recording.made


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute on `count` threads in this thread; does nothing where it does already."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
