"""The experts that tokens tell are those of the model's routers, computed by hand; who does not ask pays nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.inference import Engine, EngineConfig, Request, Sampling, Token
from gristmill.kernels.attention import packed_attention_reference
from gristmill.kernels.rotary import rotary_angles
from gristmill.model import Transformer

Tiny = Callable[..., Transformer]
IDS = [5, 9, 2, 7, 11, 3]


def by_hand(model: Transformer, ids: list[int]) -> list[list[list[tuple[int, float]]]]:
    """Of each position, of each layer, the experts and weights: block by block, the router's product written out."""
    cfg, starts = model.cfg, torch.zeros(1, len(ids), dtype=torch.long)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention_reference(q, k, v, starts)

    x = model.wte(torch.tensor([ids]))
    cos, sin = rotary_angles(torch.arange(len(ids))[None], cfg.head_dim, cfg.rope_theta)
    told: list[list[list[tuple[int, float]]]] = [[] for _ in ids]
    for layer, block in enumerate(model.blocks):
        x = block.attention_half(x, layer, cos, sin, attend)
        for position, hidden in enumerate(block.norm_2(x)[0]):
            probs = (block.ffn.router.weight @ hidden).softmax(0)
            best = sorted(range(cfg.moe_num_experts), key=lambda e: -float(probs[e]))[: cfg.moe_top_k]
            total = float(probs[best].sum())  # DBRX's weights sum to 1
            told[position].append([(e, float(probs[e]) / total) for e in best])
        x, _, _ = block.ffn_half(x)
    return told


def tokens_of(model: Transformer, prompt: list[int], engine: dict[str, Any] | None = None, **asked: Any) -> list[Token]:
    engine_cfg = EngineConfig(**{"cache_tokens": 256, "block_tokens": 8, **(engine or {})})
    settings = {"max_tokens": 6, "sampling": Sampling(temperature=0), "experts": True, **asked}
    return [t for piece in Engine(model, engine_cfg).submit(Request(prompt=prompt, **settings)) for t in piece.tokens]


@torch.no_grad()
def check(made: list[Token], model: Transformer, known: int) -> None:
    """known: ids before the first of `made` that has experts."""
    ids = [token.id for token in made]
    wanted = by_hand(model, ids[:-1])
    for position, token in enumerate(made[known:], known):
        assert [[id for id, _ in layer] for layer in token.experts] == [
            [id for id, _ in layer] for layer in wanted[position - 1]
        ]
        for layer, other in zip(token.experts, wanted[position - 1], strict=True):
            assert [w for _, w in layer] == pytest.approx([w for _, w in other], rel=1e-3)


@pytest.mark.parametrize("engine", [{}, {"token_budget": 4, "max_running": 2}], ids=["whole", "in chunks"])
def test_each_token_tells_the_experts_of_the_pass_that_predicted_it(tiny: Tiny, engine: dict[str, Any]) -> None:
    made = tokens_of(tiny(), IDS, engine)
    assert len(made) == 6
    check([*map(Token, IDS), *made], tiny(), len(IDS))


def test_an_echoed_prompt_tells_its_own_but_for_its_first_token(tiny: Tiny) -> None:
    for logprobs in (None, 2):
        made = tokens_of(tiny(), IDS, echo=True, logprobs=logprobs)
        assert [token.id for token in made[: len(IDS)]] == IDS
        assert made[0].experts == ()
        check(made, tiny(), 1)


def test_asking_changes_no_token_and_company_that_does_not_ask_is_told_nothing(tiny: Tiny) -> None:
    assert [t._replace(experts=()) for t in tokens_of(tiny(), IDS, logprobs=3)] == tokens_of(
        tiny(), IDS, logprobs=3, experts=False
    )
    model = tiny()
    engine = Engine(model, EngineConfig(cache_tokens=256))
    asks, silent = (engine.submit(Request(prompt=IDS, max_tokens=4, experts=experts)) for experts in (True, False))
    assert all(token.experts for piece in asks for token in piece.tokens)
    assert not any(token.experts for piece in silent for token in piece.tokens)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_dense_model_says_that_it_has_none(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="this model is dense"):
        Engine(tiny(ffn="dense")).submit(Request(prompt=IDS, experts=True))
