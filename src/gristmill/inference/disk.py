"""Experts on disk: those that are used most stay in memory, packed; the others are read when a step chooses them.

The next layer's experts are asked for before its turn: its router, given this layer's input, guesses most of them
(Eliseev and Mazur, 2023, arXiv:2312.17238), and a thread reads what is missing while this layer computes.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.kernels import native
from gristmill.kernels.packed import PackedExperts, aligned_empty

READERS = 2  # threads
AT_ONCE = 4  # experts on their way, of those that a step waits for
HALF_LIFE = 4096  # uses after which a use counts half


@dataclass
class Slot:
    """`score`: how often its expert was used, of late more than long ago."""

    key: tuple[int, int]  # layer, expert
    score: float = 0.0


class ExpertCache:
    """Blocks of memory for the experts of all layers together.

    read(layer, expert): one expert, packed. num_bytes: of all blocks. Raises InputError when one layer's experts do
    not fit, which a single step may need.
    """

    def __init__(
        self,
        read: Callable[[int, int], PackedExperts],
        num_layers: int,
        num_experts: int,
        num_bytes: int,
    ) -> None:
        self.read, self.shape = read, read(0, 0)
        expert_bytes = self.shape.blocks.shape[1]
        num_slots = min(num_bytes // expert_bytes, num_layers * num_experts)
        if num_slots < num_experts:
            lacking = num_experts * expert_bytes - num_bytes
            raise InputError(
                f"the memory has no room for one layer's experts, {num_experts} of {expert_bytes / 2**20:,.1f} MiB "
                f"each, beside all else; give {-(-lacking // 2**20):,} MiB more, or quantize the model to fewer bits"
            )
        self.blocks = aligned_empty(num_slots * expert_bytes).view(num_slots, expert_bytes)
        self.slots: list[Slot | None] = [None] * num_slots
        self.slot_LE = torch.full((num_layers, num_experts), -1)
        self.hits = self.misses = 0
        self._use = 1.0  # what a use adds: more with time, so that older ones count less
        self._readers = ThreadPoolExecutor(READERS, "experts", native.compute_alone)
        self._coming: dict[tuple[int, int], Future[PackedExperts]] = {}

    def of(self, layer: int, ids_TK: Tensor) -> PackedExperts:
        """A layer's experts, of which those that the tokens chose are in memory."""
        needed = ids_TK.unique().tolist()
        missing = [expert for expert in needed if self.slot_LE[layer, expert] < 0]
        self.hits += len(needed) - len(missing)
        self.misses += len(missing)
        kept = {(layer, expert) for expert in needed}
        for start in range(0, len(missing), AT_ONCE):
            self.fetch(layer, missing[start : start + AT_ONCE])
            for expert in missing[start : start + AT_ONCE]:
                self._place((layer, expert), self._coming.pop((layer, expert)).result(), kept)
        self._use *= 2 ** (len(needed) / HALF_LIFE)
        for expert in needed:
            slot = self.slots[int(self.slot_LE[layer, expert])]
            assert slot is not None
            slot.score += self._use
        if self._use > 1e100:
            self._rescale()
        made = self.shape
        return PackedExperts(self.blocks, self.slot_LE[layer], made.kind, made.F, made.group)

    def fetch(self, layer: int, experts: Iterable[int]) -> None:
        """Begin to read those that are not here."""
        for key in [key for key in self._coming if key[0] not in (layer, layer - 1)]:
            self._coming.pop(key).cancel()  # a guess that was wrong
        for expert in experts:
            key = (layer, expert)
            if self.slot_LE[key] < 0 and key not in self._coming:
                self._coming[key] = self._readers.submit(self.read, layer, expert)

    def _place(self, key: tuple[int, int], made: PackedExperts, kept: set[tuple[int, int]]) -> None:
        """Over the expert that was used least."""
        number = min(
            (number for number, slot in enumerate(self.slots) if slot is None or slot.key not in kept),
            key=lambda number: slot.score if (slot := self.slots[number]) is not None else -1.0,
        )
        if (old := self.slots[number]) is not None:
            self.slot_LE[old.key] = -1
        self.blocks[number].copy_(made.blocks[0])
        self.slots[number], self.slot_LE[key] = Slot(key), number

    def _rescale(self) -> None:
        for slot in self.slots:
            if slot is not None:
                slot.score /= self._use
        self._use = 1.0
