"""Maps our tensors to published ones: which published tensors, one after the other, are one of ours.

The elements of our tensor are the pieces' elements in order: q, k and v projections are the rows of Wqkv, one expert's
matrix is a slice of the stacked ones. A piece may be published transposed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.hub.tensors import Weight, Weights, check_names
from gristmill.model import ModelConfig, Transformer


class Piece(NamedTuple):
    """`shape` as published. `transposed`: the last two dimensions are swapped against ours."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    def of(self, ours: Tensor, start: int) -> Tensor:
        """A view, in the published shape, of those elements of ours that begin with number `start`."""
        elements = ours.reshape(-1)[start : start + torch.Size(self.shape).numel()]
        if not self.transposed:
            return elements.view(self.shape)
        *outer, rows, columns = self.shape
        return elements.view(*outer, columns, rows).mT


TensorMap: TypeAlias = Mapping[str, Sequence[Piece]]  # our name -> its pieces


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our names and shapes, in the model's order. Raises InputError when a tensor would be too large for any memory."""
    try:
        with torch.device("meta"):
            return {name: tuple(parameter.shape) for name, parameter in Transformer(cfg).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as problem:  # torch counts elements in 64 bits
        said = str(problem).splitlines()[0]
        raise InputError(
            f"the configuration asks for a tensor that no memory holds ({said}); correct its sizes"
        ) from None


def from_published(cfg: ModelConfig, table: TensorMap, published: Weights) -> Weights:
    """Our tensors, each joined from its pieces when it is read.

    Raises InputError when names or shapes are not those that the configuration asks for.
    """
    check_names({piece.name: piece.shape for pieces in table.values() for piece in pieces}, published)
    return {name: _joined(shape, table[name], published) for name, shape in shapes(cfg).items()}


def to_published(table: TensorMap, ours: Weights) -> Weights:
    """The published tensors, each cut from ours when it is read. In order, each of ours is read once."""
    pieces: dict[str, Weight] = {}
    last = _Last()
    for name, weight in ours.items():
        load = partial(last, weight.load)
        start = 0
        for piece in table[name]:
            pieces[piece.name] = Weight(piece.shape, weight.dtype, partial(_cut, load, piece, start))
            start += torch.Size(piece.shape).numel()
    return pieces


def _joined(shape: tuple[int, ...], pieces: Sequence[Piece], published: Weights) -> Weight:
    parts = [published[piece.name] for piece in pieces]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)

    def load() -> Tensor:
        if len(pieces) == 1 and not pieces[0].transposed:
            return parts[0].load().view(shape)
        whole = torch.empty(shape, dtype=dtype)
        start = 0
        for piece, part in zip(pieces, parts, strict=True):
            piece.of(whole, start).copy_(part.load())
            start += torch.Size(piece.shape).numel()
        return whole

    def rows(start: int, stop: int) -> Tensor:
        if len(pieces) == shape[0] > 1:  # an expert each
            read = [part.load() for part in parts[start:stop]]
            return torch.stack(
                [tensor.mT if piece.transposed else tensor for tensor, piece in zip(read, pieces, strict=False)]
            )
        if len(pieces) == 1 and not pieces[0].transposed:
            each = pieces[0].shape[0] // shape[0]
            return parts[0].read(start * each, stop * each).view(-1, *shape[1:])
        return load()[start:stop]

    return Weight(shape, dtype, load, rows)


def _cut(load: Callable[[], Tensor], piece: Piece, start: int) -> Tensor:
    return piece.of(load(), start)


class _Last:
    """Reads a tensor, and keeps it until another one is asked for: its pieces are written one after the other."""

    def __init__(self) -> None:
        self._load: Callable[[], Tensor] | None = None
        self._tensor: Tensor | None = None

    def __call__(self, load: Callable[[], Tensor]) -> Tensor:
        if self._tensor is None or load is not self._load:
            self._tensor = None  # before the next one is there: only one is in memory
            self._load, self._tensor = load, load()
        return self._tensor


def as_one_expert(cfg: ModelConfig, ours: Weights) -> tuple[ModelConfig, Weights]:
    """A dense model as a mixture of one expert that every token takes with weight 1: the same function."""
    if cfg.ffn == "moe":
        return cfg, ours
    mixture = replace(
        cfg,
        ffn="moe",
        moe_num_experts=1,
        moe_top_k=1,
        moe_normalize_expert_weights=1.0,
        moe_loss_weight=0.0,
        moe_jitter_eps=0.0,
    )
    weights: dict[str, Weight] = {}
    for name, shape in shapes(mixture).items():
        dense = ours.get(name.replace(".experts.", "."))
        if dense is None:
            weights[name] = Weight.of(torch.zeros(shape))  # a router: of one expert, whatever it says is certain
        else:
            weights[name] = Weight(shape, dense.dtype, partial(_viewed, dense.load, shape))
    return mixture, weights


def _viewed(load: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
    return load().view(shape)
