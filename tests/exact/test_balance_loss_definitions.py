"""Two balancing losses go by one name; ours is that of MegaBlocks, which trained DBRX, and transformers has the other.

MegaBlocks: the mean over the layers of E * sum over experts of f * P, with f an expert's share of its layer's
assignments and P its mean probability there. transformers: the tokens of all layers are pooled first, and its f counts
assignments per token, so that they sum to k.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from both import load_ours, load_theirs, recorded
from random_models import Layout, draw, packed_row
from torch import Tensor
from transformers.models.dbrx.modeling_dbrx import load_balancing_loss_func

from gristmill.model import ModelConfig, Routing, packed
from gristmill.model.transformer import MoE

E, K, LAYERS, TOKENS = 16, 4, 4, 16
WEIGHT = 0.05
SURE = 50.0  # a logit against 0: probability 1 up to rounding


def per_layer(probs_LTE: list[Tensor], top_k: int) -> float:
    losses = []
    for probs_TE in probs_LTE:
        chosen_TE = F.one_hot(probs_TE.topk(top_k).indices, probs_TE.shape[1]).sum(1)
        share_E = chosen_TE.sum(0) / chosen_TE.sum()
        losses.append(probs_TE.shape[1] * float((share_E * probs_TE.mean(0)).sum()))
    return sum(losses) / len(losses)


def pooled(probs_LTE: list[Tensor], top_k: int) -> float:
    return top_k * per_layer([torch.cat(probs_LTE)], top_k)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["dbrx", "qwen3_moe"])
@pytest.mark.parametrize("seed", range(4))
def test_each_of_the_two_computes_its_definition(layout: Layout, seed: int, tmp_path: Path) -> None:
    case = draw(layout, seed)
    case.write(tmp_path, case.model())
    (document,) = case.tokens()[:1]
    tokens, positions, ids = packed_row([document])
    ours, theirs = load_ours(tmp_path), load_theirs(tmp_path)
    with recorded(theirs, torch.ones(len(document), dtype=torch.bool)) as choices:
        auxiliary = theirs(tokens, output_router_logits=True).aux_loss
    _, routing = ours(tokens, positions, packed(ids))
    top_k, weight = case.cfg.moe_top_k, case.cfg.moe_loss_weight
    assert float(auxiliary) == pytest.approx(pooled(choices.probs, top_k), rel=1e-5)
    assert float(routing.balance_loss()) == pytest.approx(weight * per_layer(choices.probs, top_k), rel=1e-5)


def losses(logits_LTE: Tensor) -> tuple[float, float]:
    """(ours, transformers'), weighted, for routers that say these logits."""
    moe = MoE(ModelConfig(d_model=E, n_heads=1, kv_n_heads=1, moe_num_experts=E, moe_top_k=K, ffn_hidden_size=1))
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(E))
        probs, counts = (
            torch.stack(each) for each in zip(*(moe(logits_TE)[1:] for logits_TE in logits_LTE), strict=True)
        )
        ours = float(Routing(1.0, probs, counts).balance_loss())
    return WEIGHT * ours, WEIGHT * float(load_balancing_loss_func(tuple(logits_LTE), E, K))


def test_balanced_and_collapsed_routers_have_these_losses() -> None:
    fours = torch.arange(E) // K  # experts 0 to 3, 4 to 7, ...
    balanced = SURE * (fours == torch.arange(TOKENS)[:, None] % (E // K)).float().expand(LAYERS, -1, -1)
    collapsed = SURE * (fours == 0).float().expand(LAYERS, TOKENS, -1)
    # Each layer sends all its tokens to the same four experts, each layer to four others.
    rotating = SURE * (fours == torch.arange(LAYERS)[:, None]).float()[:, None].expand(-1, TOKENS, -1)
    assert losses(balanced) == pytest.approx((0.05, 0.20))
    assert losses(collapsed) == pytest.approx((0.20, 0.80))
    assert losses(rotating) == pytest.approx((0.20, 0.20))  # which pooling does not see
