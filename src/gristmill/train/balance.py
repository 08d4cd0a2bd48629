"""How experts are kept equally busy: by a loss, whose assignments are counted over more or fewer tokens, or by a bias.

Shapes: L layers, E experts.

The loss multiplies the share of assignments that each expert got with its mean probability. Over a micro-batch
(MegaBlocks) it wants every few sequences to be balanced, and depends on how a batch is cut; over the whole batch
experts may specialise (Qiu et al., 2025, arXiv:2501.11873). Those shares are known only when all micro-batches on all
ranks have gone forward, too late for the backward pass of the first. Here they are those of the batch before: they
change slowly, all ranks have them without asking, and the gradient is the same however a batch is cut.
The bias is DeepSeek's (Wang et al., 2024, arXiv:2408.15664).
"""

import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.model import Routing, Transformer
from gristmill.model.transformer import MoE
from gristmill.train.config import TrainConfig


class Balance:
    def __init__(self, cfg: TrainConfig, model: Transformer) -> None:
        if (cfg.balance == "bias") != model.cfg.moe_router_bias:
            raise InputError(
                f"train.balance={cfg.balance} does not fit model.moe_router_bias={model.cfg.moe_router_bias}: a bias "
                "needs its place in the model, and nothing else moves it; set both or neither"
            )
        self.cfg, self.model = cfg, model
        self.counts_LE: Tensor | None = None  # of the last batch, on all ranks

    def loss(self, routing: Routing, so_far_LE: Tensor) -> Tensor:
        """Of one micro-batch, weighted. so_far_LE: what this rank's tokens of the batch were assigned to, these too."""
        match self.cfg.balance:
            case "global":
                before_LE = torch.ones_like(so_far_LE) if self.counts_LE is None else self.counts_LE
                return routing.balance_loss(_shares(before_LE).to(routing.probs_LE))
            case "rank":
                return routing.balance_loss(_shares(so_far_LE).to(routing.probs_LE))
            case "micro_batch":
                return routing.balance_loss()
            case "bias":
                return routing.probs_LE.new_zeros(())

    @torch.no_grad()
    def learn(self, counts_LE: Tensor) -> None:
        """After a step: how the whole batch was assigned."""
        self.counts_LE = counts_LE
        if self.cfg.balance == "bias":
            below_LE = counts_LE.mean(1, keepdim=True) - counts_LE
            for block, below_E in zip(self.model.blocks, below_LE, strict=True):
                assert isinstance(block.ffn, MoE)
                assert block.ffn.router_bias is not None
                block.ffn.router_bias += self.cfg.bias_rate * below_E.sign().to(block.ffn.router_bias)

    def state(self) -> list[list[int]] | None:
        return None if self.counts_LE is None else self.counts_LE.long().tolist()

    def load(self, counts: list[list[int]] | None) -> None:
        device = self.model.wte.weight.device
        self.counts_LE = None if counts is None else torch.tensor(counts, dtype=torch.float64, device=device)


def _shares(counts_LE: Tensor) -> Tensor:
    return counts_LE / counts_LE.sum(1, keepdim=True)
