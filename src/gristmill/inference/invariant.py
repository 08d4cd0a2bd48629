"""Linear layers and experts that round a token's numbers alike, whatever tokens share the pass.

A matrix library chooses a kernel by the number of rows, and kernels add in different orders: the same sequence would
get other last bits, and at a near tie another text, in another batch. Here a product is made of pieces whose numbers
of rows come from a short list, and a piece is used only if a trial on this machine shows that it rounds each row as a
piece of 16 rows does. Where all agree that costs nothing; where none does, everything goes in sixteens. (He, 2025,
"Defeating Nondeterminism in LLM Inference", describes the problem and fixed tiles on GPUs.)

Few sizes have another use: oneDNN compiles a kernel for each number of rows that it meets.

Only the CPU's products are meant. The number of threads must stay the same, too.

Shapes: T tokens, K inputs, N outputs; D model, E experts, F hidden; A assignments of a token to an expert.
"""

import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.inference.tree import ModelLayers
from gristmill.kernels.memory import CACHE_LINE
from gristmill.kernels.precision import upcast
from gristmill.model import Transformer
from gristmill.model.transformer import DenseGLU, Experts, Linear

TILE = 16
Shape: TypeAlias = tuple[int, int, bool, int, torch.dtype]  # of weights: K, N, whether transposed, offset, type
Multiply: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # x [T, K], w [K, N] -> [T, N]: `product`, or `torch.mm`
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def product(x_TK: Tensor, w_KN: Tensor) -> Tensor:
    """x w in fixed pieces."""
    if lacking := -x_TK.shape[1] * x_TK.itemsize % CACHE_LINE // x_TK.itemsize:  # or rows would be aligned differently
        x_TK, w_KN = F.pad(x_TK, (0, lacking)), F.pad(w_KN.T, (0, lacking)).T
    shape = (*w_KN.shape, w_KN.stride(0) == 1, _offset(w_KN), x_TK.dtype)
    T, sizes, first = len(x_TK), _sizes(shape, torch.get_num_threads(), len(x_TK)), 0
    if sizes == (T,) and not _offset(x_TK):
        return torch.mm(x_TK, w_KN)
    out_TN = x_TK.new_empty(T, w_KN.shape[1])
    for size in sizes:
        rows = slice(first, min(first + size, T))
        x, out, first = x_TK[rows], out_TN[rows], rows.stop
        if len(x) < size:
            x = F.pad(x, (0, 0, 0, size - len(x)))
        elif _offset(x):
            x = x.clone()
        if len(out) < size or _offset(out):
            out.copy_(torch.mm(x, w_KN)[: len(out)])
        else:
            torch.mm(x, w_KN, out=out)
    return out_TN


@functools.lru_cache(maxsize=4096)
def _sizes(shape: Shape, threads: int, rows: int) -> tuple[int, ...]:
    return tuple(pieces(rows, functools.partial(_agrees, shape, threads)))


def _offset(x: Tensor) -> int:
    """Bytes beyond a cache line, which decide between kernels, too. What torch allocates begins at one."""
    return x.data_ptr() % CACHE_LINE


def pieces(rows: int, agrees: Callable[[int], bool]) -> Iterator[int]:
    """Sizes that cover so many rows, the last one perhaps with some to spare."""
    while rows > 0:
        above = next((size for size in SIZES if size >= rows and agrees(size)), None)
        below = next((size for size in reversed(SIZES) if size <= rows and agrees(size)), TILE)
        size = above if above is not None and (above <= TILE or above <= 1.5 * rows) else below
        yield size
        rows -= size


@functools.cache
def _agrees(shape: Shape, threads: int, rows: int) -> bool:
    """Whether a product of so many rows rounds each of them as one of TILE rows does: tried with random numbers."""
    if rows == TILE:
        return True
    (K, N, is_transposed, offset, dtype), chance = shape, torch.Generator().manual_seed(0)
    x = torch.randn(max(rows, TILE), K, generator=chance).to(dtype)
    start = offset // dtype.itemsize
    w = torch.empty(start + K * N, dtype=dtype)[start:].copy_(torch.randn(K * N, generator=chance))
    w = w.view(N, K).T if is_transposed else w.view(K, N)
    tried, wanted = (torch.cat([torch.mm(part.clone(), w) for part in x.split(size)]) for size in (rows, TILE))
    return torch.equal(tried, wanted)


def linear(x: Tensor, weight_NK: Tensor, multiply: Multiply = product) -> Tensor:
    """`F.linear`: x [..., K] -> [..., N] in x's dtype."""
    return multiply(x.flatten(0, -2), weight_NK.to(x.dtype).T).view(*x.shape[:-1], len(weight_NK))


def experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    w1: Tensor,
    v1: Tensor,
    w2: Tensor,
    multiply: Multiply = product,
) -> Tensor:
    """`kernels.experts.experts`, expert by expert; a token's own results are added up in the order of its choice."""
    T, K = ids_TK.shape
    order_A, weight_A = ids_TK.flatten().argsort(stable=True), weights_TK.flatten()
    counts = torch.bincount(ids_TK.flatten(), minlength=len(w1)).tolist()
    rows_AD = x_TD.new_empty(T * K, x_TD.shape[1])
    for expert, mine in enumerate(order_A.split(counts)):
        if len(mine):
            rows_AD[mine] = _glu(x_TD[mine // K], weight_A[mine], w1[expert], v1[expert], w2[expert], multiply)
    return F.embedding_bag(torch.arange(T * K).view(T, K), rows_AD, mode="sum")


def _glu(x_TD: Tensor, weight_T: Tensor, w1_FD: Tensor, v1_FD: Tensor, w2_FD: Tensor, multiply: Multiply) -> Tensor:
    gate, up = upcast(linear(x_TD, w1_FD, multiply)), upcast(linear(x_TD, v1_FD, multiply))
    silu = gate / (1 + (-gate).exp())  # torch's own rounds the last elements of a tensor in another way than the rest
    return multiply((silu * up * weight_T[:, None]).to(x_TD.dtype), w2_FD.to(x_TD.dtype))


def dense_glu(x_TD: Tensor, w1_FD: Tensor, v1_FD: Tensor, w2_FD: Tensor, multiply: Multiply = product) -> Tensor:
    """`model.transformer.dense_glu`."""
    return _glu(x_TD, x_TD.new_ones(len(x_TD), dtype=torch.float32), w1_FD, v1_FD, w2_FD, multiply)


class TorchLayers(ModelLayers):
    """PyTorch's products in fixed pieces. multiply: `torch.mm` multiplies all rows at once, which is not
    batch-invariant."""

    def __init__(self, model: Transformer, multiply: Multiply = product) -> None:
        self.multiply = multiply
        super().__init__(model)

    def refresh(self) -> None:
        super().refresh()
        for module in self.tree.modules():
            match module:
                case Linear():
                    module.product = functools.partial(linear, multiply=self.multiply)
                case Experts():
                    module.compute = functools.partial(experts, multiply=self.multiply)
                case DenseGLU():
                    module.compute = functools.partial(dense_glu, multiply=self.multiply)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return upcast(linear(hidden_TD, self.tree.output_weight, self.multiply))
