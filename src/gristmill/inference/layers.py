"""A model's linear layers and experts as the engine runs them: packed once by the native kernels, or in fixed pieces.

Either way no batch changes a bit of a token's numbers. Training's forward pass, run inside of `seated`, makes the same
bits as the engine: the log-probabilities of what an engine sampled are then exactly those that a policy gradient is
taken of.

Shapes: T tokens, D model, E experts, K experts a token, F hidden; N outputs of a matrix.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from gristmill.hub import QuantizedWeight, Weights
from gristmill.inference import invariant
from gristmill.inference.disk import ExpertCache
from gristmill.kernels import native, packed
from gristmill.kernels.experts import experts
from gristmill.kernels.packed import Packed, PackedExperts, pack, pack_experts
from gristmill.kernels.precision import upcast
from gristmill.kernels.quantized import Quantized
from gristmill.model import Transformer
from gristmill.model.transformer import DenseGLU, Experts, Linear

MATRICES = ("w1", "v1", "w2")
GUESSED_TOKENS = 4  # in a step of more, most of a layer's experts are needed anyway


class Layers(Protocol):
    def seated(self) -> AbstractContextManager[None]:
        """While it lasts, the model computes with these."""

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in fp32."""


def layers_of(model: Transformer) -> Layers:
    """Made of the weights as they are now."""
    weight = model.wte.weight
    if weight.is_cuda:
        return ModelLayers(model)
    if native.serves(torch.empty(0, dtype=model.compute_dtype)):
        return NativeLayers(model)
    return invariant.TorchLayers(model)


class ModelLayers:
    """The model's own."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def seated(self) -> AbstractContextManager[None]:
        return nullcontext()

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return self.model.logits(hidden_TD)


class NativeLayers:
    """weights: of the model's matrices, where it has none itself; None: its own. disk_bytes: None, or the memory for
    experts, of which all others stay on disk. What parallelism has replaced stays as it is.
    """

    def __init__(self, model: Transformer, weights: Weights | None = None, disk_bytes: int | None = None) -> None:
        self.model, self.dtype, self.weights = model, model.compute_dtype, weights
        self.forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        self.is_complete = True  # every matrix product of the model is computed here
        for name, module in model.named_modules():
            if "forward" in vars(module):
                self.is_complete = False
                continue
            match module:
                case Linear():
                    dtype = torch.promote_types(self.dtype, torch.float32) if name.endswith("router") else self.dtype
                    matrix = self._matrix(f"{name}.weight", dtype)
                    self.forwards[module] = partial(_linear, module, matrix)
                    if name == "lm_head":
                        self.output = matrix
                case Experts() if disk_bytes is None:
                    self.forwards[module] = partial(_experts, module, self._experts(name))
                case DenseGLU():
                    self.forwards[module] = partial(_dense, self._experts(name))
        if model.cfg.tie_word_embeddings:
            self.output = self._matrix("wte.weight", self.dtype)

        self.cache = None if disk_bytes is None else self._on_disk(disk_bytes)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return upcast(packed.product(hidden_TD, self.output))

    @contextmanager
    def seated(self) -> Iterator[None]:
        for module, forward in self.forwards.items():
            vars(module)["forward"] = forward  # not by setattr, which looks for a parameter first
        try:
            yield
        finally:
            for module in self.forwards:
                del vars(module)["forward"]

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
        routers = [self.forwards[self.model.get_submodule(f"blocks.{layer}.ffn.router")] for layer in range(L)]
        for layer, guess in enumerate([*routers[1:], None]):
            module = self.model.get_submodule(f"blocks.{layer}.ffn.experts")
            self.forwards[module] = partial(_experts_on_disk, cache, layer, guess)
        return cache


def _linear(module: Linear, matrix: Packed, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _Linear.apply(x, module.weight, matrix)
    return packed.product(x.flatten(0, -2), matrix).view(*x.shape[:-1], matrix.N)


def _experts(module: Experts, made: PackedExperts, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _Experts.apply(x_TD, weights_TK, ids_TK, module.w1, module.v1, module.w2, made)
    return packed.experts(x_TD, weights_TK, ids_TK, made)


def _dense(made: PackedExperts, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T = len(x_TD)
    out_TD = packed.experts(x_TD, torch.ones(T, 1), torch.zeros(T, 1, dtype=torch.long), made)
    return out_TD, x_TD.new_zeros(1, dtype=torch.float32), torch.tensor([T])


def _experts_on_disk(
    cache: ExpertCache,
    layer: int,
    guess: Callable[..., Tensor] | None,
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
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
