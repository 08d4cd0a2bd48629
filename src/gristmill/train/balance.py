"""How experts are kept equally busy: by a loss, whose assignments are counted over more or fewer tokens, or by a bias.

Shapes: L layers, E experts.

The loss multiplies the share of assignments that each expert got with its mean probability. Over a micro-batch
(MegaBlocks) it wants every few sequences to be balanced; over the global batch experts may specialise (Qiu et al.,
2025, arXiv:2501.11873). There all ranks add up their assignments after each forward pass, one small sum for all layers;
of a batch in several micro-batches, those that have gone forward count. The shares of the batch before, which do not
depend on how a batch is cut, were tried: a fast router runs away from them (docs/LOG.md).
The bias is DeepSeek's (Wang et al., 2024, arXiv:2408.15664).
"""

import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.model import ModelConfig, Routing, Transformer
from gristmill.model.transformer import MoE
from gristmill.parallel.ranks import ALONE, Ranks
from gristmill.train.config import TrainConfig


def check_balance(cfg: TrainConfig, model: ModelConfig) -> None:
    """Raises InputError when training needs a router bias that the model does not have, or the reverse."""
    if (cfg.balance == "bias") != model.moe_router_bias:
        raise InputError(
            f"train.balance={cfg.balance} does not fit model.moe_router_bias={str(model.moe_router_bias).lower()}: "
            "only balance=bias changes the router's bias; set both balance=bias and moe_router_bias=true, or neither"
        )


class Balance:
    """Raises InputError as `check_balance`."""

    def __init__(self, cfg: TrainConfig, model: Transformer, ranks: Ranks = ALONE) -> None:
        check_balance(cfg, model.cfg)
        self.cfg, self.model, self.ranks = cfg, model, ranks

    def loss(self, routing: Routing, so_far_LE: Tensor) -> Tensor:
        """Of one micro-batch, weighted. so_far_LE: what this rank's tokens of the batch were assigned to, these too."""
        match self.cfg.balance:
            case "global":
                everyones_LE = so_far_LE.clone()
                self.ranks.sum(everyones_LE)
                return routing.balance_loss(_shares(everyones_LE).to(routing.probs_LE))
            case "rank":
                return routing.balance_loss(_shares(so_far_LE).to(routing.probs_LE))
            case "micro_batch":
                return routing.balance_loss()
            case "bias":
                return routing.probs_LE.new_zeros(())

    @torch.no_grad()
    def after(self, counts_LE: Tensor) -> None:
        """Move the biases once a step is made. counts_LE: how the global batch was assigned."""
        if self.cfg.balance != "bias":
            return
        below_LE = counts_LE.mean(1, keepdim=True) - counts_LE
        for block, below_E in zip(self.model.blocks, below_LE, strict=True):
            assert isinstance(block.ffn, MoE)
            assert block.ffn.router_bias is not None
            block.ffn.router_bias += self.cfg.bias_rate * below_E.sign().to(block.ffn.router_bias)


def _shares(counts_LE: Tensor) -> Tensor:
    return counts_LE / counts_LE.sum(1, keepdim=True)
