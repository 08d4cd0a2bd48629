"""The interface of an optimizer."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from gristmill.plan.footprint import OptimizerCost


class UpdateRule(ABC):
    """Updates parameters with their gradients. A subclass takes `Parameters`, and its options as keywords.

    cost: What the planner needs to know: bytes of state per parameter, and the work of a step.
    options: The settings in `train.optimizer`, besides `lr` and `clip_norm`, that this optimizer uses.
    """

    cost: ClassVar[OptimizerCost]
    options: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __init__(self, *args: Any, **options: float) -> None: ...

    @abstractmethod
    def step(self, lr: float) -> None:
        """Update each parameter once at the rate `lr`. The gradients may be overwritten."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the state by name, such as "momentum/blocks.0.attn.Wqkv.weight". Filling its tensors restores it."""
