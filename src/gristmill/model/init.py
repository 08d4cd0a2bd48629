"""The initial weights of a model: a table of distributions, and random numbers that any process can reproduce.

A parameter's values depend only on the seed, its name, its shape and the table. They are drawn in pieces: each matrix
that the parameter holds (each expert of a stack) is cut into blocks of rows, and each block has its own random
generator on the CPU, seeded with a hash of the seed, the name, the matrix and the block. A process that stores a part
of a parameter draws only the pieces that overlap its part, so the weights are the same on any number of processes, and
on a CPU as on a GPU.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gristmill.model.transformer import Transformer

Initialization: TypeAlias = Literal["normal", "ones", "zeros"]

# Name pattern -> initial values. "normal" has mean 0 and the standard deviation `initializer_range`.
TABLE: dict[str, Initialization] = {
    "wte.weight": "normal",
    "lm_head.weight": "normal",
    "norm_f.weight": "ones",
    "blocks.*.norm_[12].weight": "ones",
    "blocks.*.attn.Wqkv.weight": "normal",
    "blocks.*.attn.out_proj.weight": "normal",
    "blocks.*.attn.[qk]_norm.weight": "ones",
    "blocks.*.ffn.router.weight": "normal",
    "blocks.*.ffn.router_bias": "zeros",
    "blocks.*.ffn.experts.[wv][12]": "normal",
    "blocks.*.ffn.[wv][12]": "normal",
}
PIECE_NUMEL = 2**18  # bounds the memory, and what a process draws and discards at the edges of its part


@dataclass(frozen=True)
class Part:
    """The part of a tensor that this process stores: `tensor` begins at the indices `start` of a tensor of `shape`."""

    tensor: Tensor
    shape: Sequence[int]
    start: Sequence[int]


def whole(tensor: Tensor) -> Part:
    """The part of a tensor that is stored completely."""
    return Part(tensor, tensor.shape, [0] * tensor.ndim)


@torch.no_grad()
def init_weights(model: Transformer, seed: int, part_of: Callable[[Tensor], Part] = whole) -> Transformer:
    """Initialize all parameters and buffers in place, by the table; returns the model.

    Args:
        part_of: Finds the part of a tensor that this process stores; the default is for unsplit models. Only the
            dimensions before the last one may be split.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        part = part_of(tensor)
        match initialization_of(name):
            case "normal":
                _draw_normal(part, model.cfg.initializer_range, f"{seed}/{name}")
            case "ones":
                part.tensor.fill_(1.0)
            case "zeros":
                part.tensor.zero_()
    return model


def initialization_of(name: str) -> Initialization:
    """Look a parameter's name up in the table."""
    found = [values for pattern, values in TABLE.items() if fnmatchcase(name, pattern)]
    assert len(found) == 1, f"{name} must match exactly one pattern in model/init.py's table, not {len(found)}"
    return found[0]


def _draw_normal(part: Part, std: float, key: str) -> None:
    """Fill a part of a matrix [R, C] or of a stack of matrices [E, R, C] with its random numbers."""
    num_rows, num_columns = part.shape[-2:]
    stack, first_matrix = (part.tensor, part.start[0]) if part.tensor.ndim == 3 else (part.tensor[None], 0)
    block_rows = max(1, PIECE_NUMEL // num_columns)
    start = part.start[-2]
    end = start + stack.shape[1]
    for number, rows in enumerate(stack, first_matrix):
        for block in range(start // block_rows, -(-end // block_rows)):
            first = block * block_rows
            piece = torch.empty(min(block_rows, num_rows - first), num_columns, device="cpu")
            piece.normal_(0.0, std, generator=_generator(f"{key}/{number}/{block}"))
            low, high = max(start, first), min(end, first + block_rows)
            rows[low - start : high - start].copy_(piece[low - first : high - first])


def _generator(key: str) -> torch.Generator:
    """A random generator for one piece. The CPU's generator uses 32 bits of a seed: of the 500,000 pieces of a model
    of 132B parameters, about 30 repeat the numbers of another one, somewhere else in the model."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:4], "little"))
