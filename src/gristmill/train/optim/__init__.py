"""The optimizers: one class each, listed in one table, from which the choices of `train.optimizer.name` follow."""

from gristmill.train.optim.adamw import AdamW
from gristmill.train.optim.muon import Muon
from gristmill.train.optim.rule import UpdateRule

OPTIMIZERS: dict[str, type[UpdateRule]] = {rule.cost.name: rule for rule in (AdamW, Muon)}

__all__ = ["OPTIMIZERS", "UpdateRule"]
