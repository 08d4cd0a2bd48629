"""A model's linear layers and experts as the engine runs them: packed once by the native kernels, or in fixed pieces.

Both are batch-invariant. A forward pass with gradients through `NativeLayers(model).tree` has the same bits as the
engine, and its gradients reach the model's parameters: a policy gradient is taken of exactly the log-probabilities that
the engine sampled with.

Shapes: T tokens, D model, E experts, K experts a token, F hidden; N outputs of a matrix.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gristmill.hub import QuantizedWeight, Weights
from gristmill.inference import invariant
from gristmill.inference.disk import ExpertCache
from gristmill.inference.tree import Layers, ModelLayers, freeze, share
from gristmill.kernels import native, packed
from gristmill.kernels.experts import experts
from gristmill.kernels.packed import Packed, PackedExperts, pack, pack_experts
from gristmill.kernels.precision import upcast
from gristmill.kernels.quantized import Quantized
from gristmill.model import Transformer
from gristmill.model.transformer import DenseGLU, Experts, Linear, MoE

MATRICES = ("w1", "v1", "w2")
GUESSED_TOKENS = 4  # in a step of more, most of a layer's experts are needed anyway


def layers_of(model: Transformer) -> Layers:
    """The batch-invariant layers that this machine has, of the weights as they are now; on a GPU the model's own."""
    weight = model.wte.weight
    if weight.is_cuda:
        return ModelLayers(model)
    if native.serves(torch.empty(0, dtype=model.compute_dtype)):
        return NativeLayers(model)
    return invariant.TorchLayers(model)


class NativeLayers:
    """Packed copies of the model's matrices. The tree shares the other weights with the model: the embedding, the norms
    and the routers' biases.

    Args:
        weights: where the model has no matrices itself, theirs. None: the model's own.
        disk_bytes: memory for experts; the others stay on disk. None: all experts are in memory.
    """

    def __init__(self, model: Transformer, weights: Weights | None = None, disk_bytes: int | None = None) -> None:
        self.model, self.dtype, self.weights, self.disk_bytes = model, model.compute_dtype, weights, disk_bytes
        self.refresh()

    def refresh(self) -> None:
        self.tree = share(self.model)
        self.cache: ExpertCache | None = None
        for name, module in self.tree.named_modules():
            match module:
                case Linear():
                    dtype = torch.promote_types(self.dtype, torch.float32) if name.endswith("router") else self.dtype
                    matrix = self._matrix(f"{name}.weight", dtype)
                    module.product = partial(_product, matrix)
                    if name == "lm_head":
                        self.output = matrix
                case Experts() if self.disk_bytes is None:
                    module.compute = partial(_experts, self._experts(name))
                case DenseGLU():
                    module.compute = partial(_dense_glu, self._experts(name))
        if self.model.cfg.tie_word_embeddings:
            self.output = self._matrix("wte.weight", self.dtype)
        if self.disk_bytes is not None:
            self.cache = self._on_disk(self.disk_bytes)

    def freeze(self) -> None:
        freeze(self.tree, unread=(Linear, Experts, DenseGLU))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return upcast(packed.product(hidden_TD, self.output))

    def _read(self, name: str, dtype: torch.dtype) -> Tensor | Quantized:
        if self.weights is None:
            return self.model.get_parameter(name).detach().to(dtype)
        match self.weights[name]:
            case QuantizedWeight() as weight:
                return weight.quantized()
            case weight:
                return weight.load().to(dtype)

    def _matrix(self, name: str, dtype: torch.dtype) -> Packed:
        return pack(self._read(name, dtype))

    def _experts(self, name: str) -> PackedExperts:
        """Of a mixture, or the one of a dense model."""
        w1, v1, w2 = (self._read(f"{name}.{matrix}", self.dtype) for matrix in MATRICES)
        return pack_experts(w1, v1, w2)

    def _on_disk(self, num_bytes: int) -> ExpertCache:
        weights, dtype, L = self.weights, self.dtype, self.model.cfg.n_layers
        assert weights is not None

        def read(layer: int, expert: int) -> PackedExperts:
            found = (weights[f"blocks.{layer}.ffn.experts.{matrix}"].expert(expert) for matrix in MATRICES)
            w1, v1, w2 = (one if isinstance(one, Quantized) else one.to(dtype) for one in found)
            # Blocks have one size, and not every expert need fit in a smaller one.
            return pack_experts(w1, v1, w2, shorten=False)

        cache = ExpertCache(read, L, self.model.cfg.moe_num_experts, num_bytes)
        layers = [block.ffn for block in self.tree.blocks if isinstance(block.ffn, MoE)]
        routers = [ffn.router for ffn in layers]
        for layer, (ffn, guess) in enumerate(zip(layers, [*routers[1:], None], strict=True)):
            ffn.experts.compute = partial(_experts_on_disk, cache, layer, guess)
        return cache


def _product(matrix: Packed, x: Tensor, weight: Tensor) -> Tensor:
    """weight: of the model, for its gradient."""
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, matrix)
    return packed.product(x.flatten(0, -2), matrix).view(*x.shape[:-1], matrix.N)


def _experts(
    made: PackedExperts, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, w1: Tensor, v1: Tensor, w2: Tensor
) -> Tensor:
    """w1, v1, w2: of the model, for their gradients."""
    if torch.is_grad_enabled():
        return _Experts.apply(x_TD, weights_TK, ids_TK, w1, v1, w2, made)
    return packed.experts(x_TD, weights_TK, ids_TK, made)


def _dense_glu(made: PackedExperts, x_TD: Tensor, *unread: Tensor) -> Tensor:
    T = len(x_TD)
    return packed.experts(x_TD, torch.ones(T, 1), torch.zeros(T, 1, dtype=torch.long), made)


def _experts_on_disk(
    cache: ExpertCache,
    layer: int,
    guess: Callable[[Tensor], Tensor] | None,
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    *unread: Tensor,
) -> Tensor:
    """guess: the next layer's router."""
    made = cache.of(layer, ids_TK)
    if guess is not None and len(x_TD) <= GUESSED_TOKENS:
        cache.fetch(layer + 1, guess(upcast(x_TD)).topk(ids_TK.shape[1]).indices.unique().tolist())
    return packed.experts(x_TD, weights_TK, ids_TK, made)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_NK, matrix):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight_NK)
        return packed.product(x.flatten(0, -2), matrix).view(*x.shape[:-1], matrix.N)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight_NK = ctx.saved_tensors
        dweight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight_NK.dtype)
        return grad @ weight_NK.to(grad.dtype), dweight, None


class _Experts(torch.autograd.Function):
    """The gradients are those of training's own experts, which compute what they need for them again."""

    @staticmethod
    def forward(ctx, x_TD, weights_TK, ids_TK, w1, v1, w2, made):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_TD, weights_TK, ids_TK, w1, v1, w2)
        return packed.experts(x_TD, weights_TK, ids_TK, made)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, weights_TK, ids_TK, *matrices = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in (x_TD, weights_TK, *matrices)]
        with torch.enable_grad():
            out_TD = experts(*leaves[:2], ids_TK, *leaves[2:])
        dx_TD, dweights_TK, *dmatrices = torch.autograd.grad(out_TD, leaves, grad_TD)
        return dx_TD, dweights_TK, None, *dmatrices, None
