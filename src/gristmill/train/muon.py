"""Muon over all matrices of one shape at once.

The method is Jordan's (2024, kellerjordan.github.io/posts/muon) with the step size of Liu et al. (2025,
arXiv:2502.16982): a step equals torch.optim.Muon's on each matrix. That one takes the matrices in turn, and one product
of 128 rows keeps neither a CPU's cores nor a GPU busy; here batches of matrices are multiplied.

Shapes: N matrices of R rows and C columns, R <= C.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Jordan's quintic: steep at zero, so that few steps bring most singular values to between 0.7 and 1.2.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
STEPS = 5
EPS = 1e-7
# Numbers in a batch, which bounds the memory: what stays in a CPU's caches; enough to fill a GPU.
BATCH_NUMEL = {"cpu": 2**20, "cuda": 2**26}


def orthogonalised(x_NRC: Tensor) -> Tensor:
    """For each matrix USVᵀ about UVᵀ, in x's dtype: Newton-Schulz steps on the matrix over its norm. Overwrites x."""
    num, num_rows = x_NRC.shape[:2]
    x_NRC.div_(x_NRC.flatten(1).norm(dim=1).clamp(min=EPS)[:, None, None])
    gram_NRR = x_NRC.new_empty(num, num_rows, num_rows)
    poly_NRR, next_NRC = torch.empty_like(gram_NRR), torch.empty_like(x_NRC)
    for _ in range(STEPS):
        torch.bmm(x_NRC, x_NRC.mT, out=gram_NRR)
        torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=CUBIC, alpha=QUINTIC, out=poly_NRR)
        torch.baddbmm(x_NRC, poly_NRR, x_NRC, beta=LINEAR, out=next_NRC)
        x_NRC, next_NRC = next_NRC, x_NRC
    return x_NRC


@torch.no_grad()
def muon_update(weights: Sequence[Tensor], momenta: Sequence[Tensor], lr: float, dtype: torch.dtype) -> None:
    """Move each matrix by `lr` against its orthogonalised momentum, which is made in `dtype`."""
    for (_, num_columns), numbers in batches([(w.shape[0], w.shape[1]) for w in weights], weights[0].device.type):
        x_NRC = torch.stack([lying(momenta[i]) for i in numbers]).to(dtype)
        update_NRC = orthogonalised(x_NRC).to(weights[0].dtype)
        size = 0.2 * num_columns**0.5  # its root mean square is then like AdamW's
        torch._foreach_add_([lying(weights[i]) for i in numbers], list(update_NRC.unbind()), alpha=-lr * size)


def lying(matrix: Tensor) -> Tensor:
    """Transposed where it is taller than wide."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def batches(shapes: Sequence[tuple[int, int]], device: str) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """((R, C), the numbers of matrices of that shape, upright or lying), at most BATCH_NUMEL or one matrix together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (rows, columns) in enumerate(shapes):
        alike.setdefault((min(rows, columns), max(rows, columns)), []).append(number)
    for (few, many), numbers in alike.items():
        count = max(1, BATCH_NUMEL[device] // (few * many))
        for first in range(0, len(numbers), count):
            yield (few, many), numbers[first : first + count]
