"""Attention over keys and values in blocks, for the parts of a step: each query sees its own sequence, up to itself.

Shapes: T tokens of the step's row, H query heads, G key/value heads, R = H / G, C head size, L layers, N blocks, B
tokens of a block; in a group of tiles: S sequences, M tiles of each, Q queries of a tile, K keys.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.errors import Failure
from gristmill.inference.scheduler import Part
from gristmill.kernels import native
from gristmill.kernels.memory import available_bytes
from gristmill.model import Transformer
from gristmill.model.transformer import Attend

TILE_ROWS = 16  # of attention: queries times the heads that share a key
BUCKET = 64  # keys are read up to the next multiple of it


class Paged(Protocol):
    @property
    def nbytes(self) -> int:
        """Of the cache."""

    def attend(self, parts: Sequence[Part]) -> Attend:
        """Of one step: keys and values of the parts' tokens go into their blocks."""


def paged_attention(model: Transformer, num_blocks: int, block_tokens: int) -> Paged:
    assert block_tokens > 1
    assert BUCKET % block_tokens == 0
    if native.serves(torch.empty(0, dtype=model.compute_dtype, device=model.wte.weight.device)):
        heads_per_key = model.cfg.n_heads // model.cfg.kv_n_heads
        if heads_per_key <= native.constants().block:
            return NativePaged(model, num_blocks, block_tokens)
    return TorchPaged(model, num_blocks, block_tokens)


def _cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros for keys and values. Raises Failure, before it takes any memory, when they do not fit."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes <= (free := available_bytes()):
        return torch.zeros(shape, dtype=dtype, device=device)
    raise Failure(
        f"the key/value cache needs {num_bytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of memory are available; "
        "lower --max-tokens or cache_tokens, or use a machine with more memory"
    )


class NativePaged:
    """native/paged.h: bit for bit what training's attention computes."""

    def __init__(self, model: Transformer, num_blocks: int, block_tokens: int) -> None:
        cfg, self.block_tokens = model.cfg, block_tokens
        shape = (2, cfg.n_layers, num_blocks, cfg.kv_n_heads, native.padded(cfg.head_dim) * block_tokens)
        self.keys_LNGB, self.values_LNGB = _cache(shape, model.compute_dtype, torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        return self.keys_LNGB.nbytes + self.values_LNGB.nbytes

    def attend(self, parts: Sequence[Part]) -> Attend:
        slots: list[int] = []
        table: list[int] = []
        B, numbers, first = self.block_tokens, [], 0
        for part in parts:
            blocks, count = part.job.blocks, part.end - part.start
            slots += [blocks[position // B] * B + position % B for position in range(part.start, part.end)]
            numbers.append((first, count, part.start, len(table)))
            table += blocks[: -(-part.end // B)]
            first += count
        return self.attend_at(torch.tensor(slots), torch.tensor(numbers), torch.tensor(table))

    def attend_at(self, *where: Tensor) -> Attend:
        """where: see `native.paged_attention`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q [1, T, H, C], k and v [1, T, G, C] -> [1, T, H, C]."""
            keys, values = self.keys_LNGB[layer], self.values_LNGB[layer]
            return native.paged_attention(q[0], k[0], v[0], keys, values, *where)[None]

        return attend


@dataclass(frozen=True)
class Group:
    """Tiles that see equally many keys. A query has its place in a tile, and its number of keys, from its position
    alone; so decoding, and a prompt in whatever chunks, multiply matrices of the same shape."""

    table_SN: Tensor  # the blocks of the keys
    beyond_SK: Tensor  # keys that are not of the sequence
    source_A: Tensor  # a tile's places that hold a query
    token_A: Tensor  # and the tokens of the row whose queries they are
    visible_TQK: Tensor  # [S * M, 1, R * Q, K] of bool: keys that a query sees


class OneEach:
    """A step in which each of `count` sequences has one token: tensors that stay, and are filled anew.

    tensors: the tokens and their positions, [1, count] each, and where their keys and values lie, see
    `native.paged_attention`.
    """

    def __init__(self, count: int, context: int, block_tokens: int) -> None:
        self.block_tokens, most = block_tokens, -(-context // block_tokens)
        tokens, positions = torch.zeros(2, 1, count, dtype=torch.long)
        slots, tables = torch.zeros(count, dtype=torch.long), torch.zeros(count, most, dtype=torch.long)
        parts = torch.tensor([(row, 1, 0, row * most) for row in range(count)])
        self.tensors = [tokens, positions, slots, parts, tables]
        self._arrays = [tensor.numpy() for tensor in self.tensors]  # a write through torch takes several times as long
        self._held: list[list[int]] = [[] for _ in range(count)]

    def fill(self, parts: Sequence[Part]) -> None:
        B, (tokens, positions, slots, numbers, tables) = self.block_tokens, self._arrays
        for row, part in enumerate(parts):
            at, blocks = part.start, part.job.blocks
            tokens[0, row] = part.job.ids[at]
            positions[0, row] = numbers[row, 2] = at
            slots[row] = blocks[at // B] * B + at % B
            if self._held[row] != (held := blocks[: at // B + 1]):
                self._held[row] = held
                tables[row, : len(held)] = held


class TorchPaged:
    """The same by torch's own attention, over tiles whose place and number of keys follow from positions alone."""

    def __init__(self, model: Transformer, num_blocks: int, block_tokens: int) -> None:
        cfg, self.block_tokens, self.device = model.cfg, block_tokens, model.wte.weight.device
        self.repeats = cfg.n_heads // cfg.kv_n_heads
        self.tile = max(q for q in (1, 2, 4, 8, 16) if q == 1 or q * self.repeats <= TILE_ROWS)
        shape = (2, cfg.n_layers, num_blocks, block_tokens, cfg.kv_n_heads, cfg.head_dim)
        self.keys_LNBGC, self.values_LNBGC = _cache(shape, model.compute_dtype, self.device)

    @property
    def nbytes(self) -> int:
        return self.keys_LNBGC.nbytes + self.values_LNBGC.nbytes

    def attend(self, parts: Sequence[Part]) -> Attend:
        groups, slot_T = list(self._groups(parts)), torch.cat([self._slots(part) for part in parts]).to(self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q [1, T, H, C], k and v [1, T, G, C] -> [1, T, H, C]."""
            keys, values = self.keys_LNBGC[layer], self.values_LNBGC[layer]
            keys.flatten(0, 1)[slot_T] = k[0]
            values.flatten(0, 1)[slot_T] = v[0]
            out = torch.empty_like(q)
            for group in groups:
                self._attend(group, q[0], keys, values, out[0])
            return out

        return attend

    def _slots(self, part: Part) -> Tensor:
        """[tokens of the part]: where each one's key lies among all of the blocks'."""
        position = torch.arange(part.start, part.end)
        return torch.tensor(part.job.blocks)[position // self.block_tokens] * self.block_tokens + (
            position % self.block_tokens
        )

    def _groups(self, parts: Sequence[Part]) -> Iterator[Group]:
        """A chunk's queries by the bucket that they lie in; decoding sequences in the same bucket go together."""
        alone: list[list[tuple[int, Part]]] = []
        together: dict[int, list[tuple[int, Part]]] = defaultdict(list)
        first = 0
        for part in parts:
            numbered = (first, part)
            if part.end - part.start == 1:
                together[part.start // BUCKET].append(numbered)
            else:
                alone.append([numbered])
            first += part.end - part.start
        for number, members in together.items():
            yield self._group(number, members)
        for members in alone:
            part = members[0][1]
            for number in range(part.start // BUCKET, (part.end - 1) // BUCKET + 1):
                yield self._group(number, members)

    def _group(self, number: int, members: list[tuple[int, Part]]) -> Group:
        """The tiles of the bucket that the members' queries touch: equally many for each of them."""
        num_keys, tables, ends, sources, tokens, positions, place = (number + 1) * BUCKET, [], [], [], [], [], 0
        for first, part in members:
            low, high = max(part.start, num_keys - BUCKET), min(part.end, num_keys)
            begin, end = low // self.tile * self.tile, -(-high // self.tile) * self.tile
            blocks = part.job.blocks[: num_keys // self.block_tokens]
            tables.append(blocks + [0] * (num_keys // self.block_tokens - len(blocks)))
            ends.append(high)
            sources.append(torch.arange(low, high) - begin + place)
            tokens.append(torch.arange(low, high) - part.start + first)
            positions.append(torch.arange(begin, end))
            place += end - begin
        key = torch.arange(num_keys)
        position_TQ = torch.cat(positions).view(-1, 1, self.tile).expand(-1, self.repeats, -1).flatten(1)
        made = Group(
            torch.tensor(tables),
            key >= torch.tensor(ends)[:, None],
            torch.cat(sources),
            torch.cat(tokens),
            (key <= position_TQ[:, :, None])[:, None],
        )
        return Group(*(getattr(made, name).to(self.device) for name in made.__dataclass_fields__))

    def _attend(self, group: Group, q_THC: Tensor, k_NBGC: Tensor, v_NBGC: Tensor, out_THC: Tensor) -> None:
        H, C, (S, K) = *q_THC.shape[1:], group.beyond_SK.shape
        tiles, G = len(group.visible_TQK), H // self.repeats
        q = q_THC.new_zeros(tiles * self.tile, H, C)
        q[group.source_A] = q_THC[group.token_A]
        q = q.view(tiles, self.tile, G, self.repeats, C).permute(0, 2, 3, 1, 4).reshape(tiles, G, -1, C)
        # What lies beyond a sequence is another's, or old: masked, but a number that is none would come through.
        k, v = (
            x[group.table_SN].view(S, K, G, C).masked_fill_(group.beyond_SK[:, :, None, None], 0).transpose(1, 2)
            for x in (k_NBGC, v_NBGC)
        )
        k, v = (x.expand(tiles, -1, -1, -1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.visible_TQK)
        out = out.view(tiles, G, self.repeats, self.tile, C).permute(0, 3, 1, 2, 4).reshape(-1, H, C)
        out_THC[group.token_A] = out[group.source_A]
