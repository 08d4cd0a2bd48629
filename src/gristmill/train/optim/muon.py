"""Muon: each hidden matrix moves against its orthogonalized momentum; all other parameters are AdamW's.

The method is Jordan's (2024, kellerjordan.github.io/posts/muon) with the step size of Liu et al. (2025,
arXiv:2502.16982): a step equals torch.optim.Muon's on each matrix. That one processes one matrix at a time, and one
product of 128 rows keeps neither a CPU's cores nor a GPU busy; here batches of matrices are multiplied.

A parameter may hold several matrices: the experts are stacked, and q, k and v are fused. Each matrix is updated by
itself, as a view that shares the parameter's memory. If the model is split, whole matrices are gathered, each on one
rank.

Shapes: N matrices of R rows and C columns, R <= C.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gristmill.parallel.mesh import local
from gristmill.parallel.wholes import Wholes
from gristmill.plan.footprint import FP32, OptimizerCost
from gristmill.train.optim.adamw import AdamW
from gristmill.train.optim.parameters import Parameters, split_matrices
from gristmill.train.optim.rule import UpdateRule

# Jordan's quintic: steep at zero, so that few iterations bring most singular values to between 0.7 and 1.2.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
EPS = 1e-7
# Elements in a batch, which bound the memory: they fit into a CPU's caches, and fill a GPU.
BATCH_NUMEL = {"cpu": 2**20, "cuda": 2**26}


class Muon(UpdateRule):
    """Muon for hidden matrices, AdamW without weight decay for embeddings, norms and routers."""

    cost = OptimizerCost(
        name="muon",
        bytes_per_parameter=AdamW.cost.bytes_per_parameter,
        bytes_per_matrix_parameter=FP32,
        batch_numel=BATCH_NUMEL,
        iterations=ITERATIONS,
    )
    options = ("weight_decay", "momentum", "embedding_lr_ratio", "beta1", "beta2")

    def __init__(
        self,
        parameters: Parameters,
        *,
        weight_decay: float,
        momentum: float,
        embedding_lr_ratio: float,
        beta1: float,
        beta2: float,
    ) -> None:
        self.parameters, self.matrices = parameters, parameters.matrices
        self.weight_decay, self.beta, self.embedding_lr_ratio = weight_decay, momentum, embedding_lr_ratio
        others = [name for name in parameters.whole if name not in self.matrices]
        self.adamw = AdamW(parameters, others, weight_decay=0.0, beta1=beta1, beta2=beta2)
        self.momentum = {name: torch.zeros_like(parameters.whole[name]) for name in self.matrices}

    def state(self) -> dict[str, Tensor]:
        return self.adamw.state() | {f"momentum/{name}": momentum for name, momentum in self.momentum.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.adamw.step(lr * self.embedding_lr_ratio)
        parts = [self.parameters.parts[name].detach() for name in self.matrices]
        grads = [self._grad(name) for name in self.matrices]
        momenta = [local(momentum) for momentum in self.momentum.values()]
        torch._foreach_lerp_(momenta, grads, 1 - self.beta)
        torch._foreach_lerp_(grads, momenta, self.beta)  # Nesterov's momentum; it overwrites the gradients
        if self.weight_decay:
            torch._foreach_mul_(parts, 1 - lr * self.weight_decay)
        if self.parameters.is_split:
            self._update_split(dict(zip(self.matrices, grads, strict=True)), lr)
        else:
            rows = list(self.matrices.values())
            update_matrices(_views(parts, rows), _views(grads, rows), lr, self.parameters.compute_dtype)

    def _grad(self, name: str) -> Tensor:
        grad = self.parameters.parts[name].grad
        assert grad is not None, f"{name} has no gradient"
        return grad

    def _update_split(self, grads: dict[str, Tensor], lr: float) -> None:
        """Update matrices that are split over ranks. Equal ones are gathered together, each on one rank, but only as
        many at a time as keep the ranks busy, because whole matrices cost memory."""
        alike: dict[object, list[str]] = {}
        for name in grads:
            param = self.parameters.whole[name]
            assert isinstance(param, DTensor)
            alike.setdefault((param.shape, param.placements, self.matrices[name]), []).append(name)
        for names in alike.values():
            like, rows = self.parameters.whole[names[0]], self.matrices[names[0]]
            assert isinstance(like, DTensor)
            # The matrices of a stack are exchanged one by one; q, k and v, split across their borders, stay together.
            weights = [part for name in names for part in _exchanged(self.parameters.parts[name].detach(), rows)]
            parts = [part for name in names for part in _exchanged(grads[name], rows)]
            at_once = Wholes.at_once(like, parts[0], BATCH_NUMEL[like.device.type])
            for first in range(0, len(parts), at_once):
                some = parts[first : first + at_once]
                exchange = Wholes(like, some[0], len(some))
                wholes = exchange.gathered(some)
                moves = torch.zeros_like(wholes)
                if len(wholes):  # there may be more ranks than matrices
                    each = [rows or (wholes.shape[1],)] * len(wholes)
                    moves_of, wholes_of = _views(moves.unbind(), each), _views(wholes.unbind(), each)
                    update_matrices(moves_of, wholes_of, lr, self.parameters.compute_dtype)
                torch._foreach_add_(weights[first : first + at_once], exchange.returned(moves))


def _views(tensors: Sequence[Tensor], rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [matrix for tensor, its in zip(tensors, rows, strict=True) for matrix in split_matrices(tensor, its)]


def _exchanged(part: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    """Return the pieces of a parameter's part that are exchanged by themselves."""
    return [part] if rows else list(part.unbind())


@torch.no_grad()
def update_matrices(weights: Sequence[Tensor], momenta: Sequence[Tensor], lr: float, dtype: torch.dtype) -> None:
    """Move each matrix by `lr` against its momentum, which is orthogonalized in `dtype`."""
    for (_, num_columns), numbers in batches([(w.shape[0], w.shape[1]) for w in weights], weights[0].device.type):
        x_NRC = torch.stack([wide(momenta[i]) for i in numbers]).to(dtype)
        update_NRC = orthogonalize(x_NRC).to(weights[0].dtype)
        size = 0.2 * num_columns**0.5  # the root mean square of an update is then like AdamW's
        torch._foreach_add_([wide(weights[i]) for i in numbers], list(update_NRC.unbind()), alpha=-lr * size)


def orthogonalize(x_NRC: Tensor) -> Tensor:
    """Return about UVᵀ for each matrix USVᵀ, in x's dtype, by Newton-Schulz iterations. Overwrites x."""
    num, num_rows = x_NRC.shape[:2]
    x_NRC.div_(x_NRC.flatten(1).norm(dim=1).clamp(min=EPS)[:, None, None])
    gram_NRR = x_NRC.new_empty(num, num_rows, num_rows)
    poly_NRR, next_NRC = torch.empty_like(gram_NRR), torch.empty_like(x_NRC)
    for _ in range(ITERATIONS):
        torch.bmm(x_NRC, x_NRC.mT, out=gram_NRR)
        torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=CUBIC, alpha=QUINTIC, out=poly_NRR)
        torch.baddbmm(x_NRC, poly_NRR, x_NRC, beta=LINEAR, out=next_NRC)
        x_NRC, next_NRC = next_NRC, x_NRC
    return x_NRC


def wide(matrix: Tensor) -> Tensor:
    """Return the matrix, transposed if it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def batches(shapes: Sequence[tuple[int, int]], device: str) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Group matrices of one shape, or its transpose. Yields ((R, C), their numbers); a batch has one matrix or at most
    BATCH_NUMEL elements."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (rows, columns) in enumerate(shapes):
        alike.setdefault((min(rows, columns), max(rows, columns)), []).append(number)
    for (few, many), numbers in alike.items():
        count = max(1, BATCH_NUMEL[device] // (few * many))
        for first in range(0, len(numbers), count):
            yield (few, many), numbers[first : first + count]
