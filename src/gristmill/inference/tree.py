"""The engine's own tree of modules over a model's weights: what the engine sets on it never reaches the model.

The tree is an ordinary `Transformer`, built on the meta device, whose parameters are then the model's own. So there is
one definition of the model, and no weight is in memory twice.
"""

from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from gristmill.model import Transformer


class Layers(Protocol):
    """What an engine computes with: a tree whose products are packed, batch-invariant, or the model's own."""

    tree: Transformer

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in fp32."""

    def refresh(self) -> None:
        """Take the model's weights as they are now. The old ones are released first."""

    def freeze(self) -> None:
        """Copy the weights that are still shared with the model and that training changes, see `freeze`."""


class ModelLayers:
    """The model's own arithmetic, without what was applied to its modules (compilation, recomputation, hooks)."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        self.tree = share(self.model)

    def freeze(self) -> None:
        freeze(self.tree)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return self.tree.logits(hidden_TD)


def share(model: Transformer) -> Transformer:
    """Build a tree of modules over the model's own parameters and buffers. Gradients reach the model's parameters."""
    with torch.device("meta"):
        tree = Transformer(model.cfg, model.compute_dtype)
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        setattr(tree.get_submodule(path), leaf, tensor)
    return tree


def freeze(tree: Transformer, unread: tuple[type[nn.Module], ...] = ()) -> None:
    """Replace the tree's buffers and trainable parameters by copies, so that training can no longer change them.

    Parameters without `requires_grad`, such as those of a model loaded for inference, stay shared: nobody trains them.

    Args:
        unread: types of modules whose parameters the tree does not read without gradients; they are left as they are.
    """
    for module in tree.modules():
        if isinstance(module, unread):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())
