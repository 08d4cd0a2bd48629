"""One forward pass of the model over the parts of a step: all their tokens in one row.

Shapes: T tokens of the row, D model, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gristmill.inference.layers import Layers, layers_of
from gristmill.inference.paged import paged_attention
from gristmill.inference.scheduler import Part
from gristmill.model import Transformer

LOGITS_ROWS = 256  # rows whose logits stand in memory at once


class Runner:
    """layers: None are those of the model's weights as they are now."""

    def __init__(self, model: Transformer, num_blocks: int, block_tokens: int, layers: Layers | None = None) -> None:
        self.model, self.layers = model, layers or layers_of(model)
        self.paged = paged_attention(model, num_blocks, block_tokens)
        self.device, self.threads = model.wte.weight.device, torch.get_num_threads()

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """[T, D]: the hidden states of all tokens, part after part."""
        tokens = torch.tensor([[id for part in parts for id in part.job.ids[part.start : part.end]]])
        positions = torch.tensor([[position for part in parts for position in range(part.start, part.end)]])
        torch.set_num_threads(self.threads)  # another number may round otherwise
        with evaluating(self.model), self.layers.seated():
            hidden, _ = self.model(tokens.to(self.device), positions.to(self.device), self.paged.attend(parts))
        return hidden[0]

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor) -> Iterator[Tensor]:
        """[V] in fp32 on the CPU, of each row."""
        for rows in hidden_TD.split(LOGITS_ROWS):
            yield from self.layers.logits(rows).cpu()


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
