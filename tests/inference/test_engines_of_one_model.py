"""Engines have their own modules: several may share a model, in threads of their own, while the model is trained.

The reference is one engine at a time, without training.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gristmill.inference import Engine, EngineConfig, Request, Sampling, Token
from gristmill.kernels import native
from gristmill.model import Transformer, packed

Tiny = Callable[..., Transformer]
Answers = list[list[Token]]
DBRX = {"moe_num_experts": 16, "moe_top_k": 4, "d_model": 64, "n_heads": 8, "kv_n_heads": 2, "moe_jitter_eps": 0.01}
QWEN = {"norm": "rms_norm", "qk_norm": True, "clip_qkv": None, "tie_word_embeddings": True}
BIASED = {"moe_router_bias": True}
DENSE = {"ffn": "dense"}
CONFIGS = (
    EngineConfig(cache_tokens=80, token_budget=24, max_running=4),  # too little for all: sequences are preempted
    EngineConfig(cache_tokens=1024),
)


def requests(model: Transformer) -> list[Request]:
    return [
        Request(
            prompt=[(7 * number + 3 * n) % 300 for n in range(1 + 5 * number)],
            max_tokens=10 + number,
            sampling=Sampling(temperature=1.0, seed=number),
            logprobs=2,
            experts=number == 2 and model.cfg.ffn == "moe",
        )
        for number in range(4)
    ]


def answers(engine: Engine) -> Answers:
    streams = [engine.submit(request) for request in requests(engine.model)]
    return [[token for piece in stream for token in piece.tokens] for stream in streams]


def train(model: Transformer, steps: int) -> None:
    optimizer, chance = torch.optim.SGD(model.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the jitter
    for _ in range(steps):
        rows = torch.randint(300, (4, 33), generator=chance)
        positions = torch.arange(32).expand(4, -1)
        hidden, _ = model(rows[:, :-1], positions, packed(torch.zeros(4, 32)))
        F.cross_entropy(model.logits(hidden).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, buffer in model.named_buffers():
            assert name.endswith("router_bias")
            buffer += 0.1 * torch.randn(buffer.shape, generator=chance)


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = native.available()[-1] if request.param == "native" else "torch"
    monkeypatch.setattr(native, "_in_use", name)
    return name


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [(DBRX, torch.bfloat16), (QWEN, torch.float32), (BIASED, torch.bfloat16), (DENSE, torch.float32)],
)
def test_two_engines_under_load_while_their_model_is_trained_answer_as_each_by_itself(
    tiny: Tiny, changes: dict[str, Any], dtype: torch.dtype, kernels: str
) -> None:
    torch.set_num_threads(1 if kernels == "torch" else 2)
    model = tiny(**changes).train()
    model.compute_dtype = dtype
    twin = deepcopy(model)
    train(twin, steps=3)
    wanted = [answers(Engine(model, cfg)) for cfg in CONFIGS]
    engines = [Engine(model, cfg) for cfg in CONFIGS]
    together, trained = threading.Barrier(3), threading.Event()

    def load(engine: Engine) -> list[Answers]:
        """Answer all requests again and again, for the last time after training has ended."""
        together.wait(60)
        rounds = []
        while not trained.is_set():
            rounds.append(answers(engine))
        return [*rounds, answers(engine)]

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, engine) for engine in engines]
        together.wait(60)
        train(model, steps=3)
        trained.set()
        for given, its in zip(wanted, loads, strict=True):
            assert all(answer == given for answer in its.result())
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), "training is not disturbed either"


@pytest.mark.parametrize("changes", [DBRX, QWEN, BIASED, DENSE])
def test_a_refreshed_engine_is_one_that_was_built_now(tiny: Tiny, changes: dict[str, Any], kernels: str) -> None:
    model = tiny(**changes)
    engine = Engine(model, CONFIGS[1])
    before = answers(engine)
    train(model, steps=2)
    assert answers(engine) == before
    engine.refresh()
    wanted = answers(Engine(model, CONFIGS[1]))
    assert answers(engine) == wanted != before, "no cached prefix and no recorded step is of the old weights"


def test_a_request_that_has_begun_continues_with_the_new_weights(tiny: Tiny, kernels: str) -> None:
    model = tiny()
    engine = Engine(model, CONFIGS[1])
    greedy = Sampling(temperature=0.0)
    stream = engine.submit(Request(prompt=[1, 2, 3], max_tokens=20, sampling=greedy))
    for _ in range(6):
        engine.step()
    begun = [token.id for piece in stream.take() for token in piece.tokens]
    train(model, steps=2)
    engine.refresh()
    rest = [token.id for piece in stream for token in piece.tokens]
    request = Request(prompt=[1, 2, 3, *begun], max_tokens=20 - len(begun), sampling=greedy)
    assert rest == [token.id for piece in Engine(model, CONFIGS[1]).submit(request) for token in piece.tokens]


def test_weights_that_nobody_trains_are_shared(tiny: Tiny, kernels: str) -> None:
    for trainable in (False, True):
        model = tiny(moe_router_bias=True).requires_grad_(trainable)
        tree = Engine(model, CONFIGS[1]).runner.layers.tree
        assert (tree.wte.weight.data_ptr() == model.wte.weight.data_ptr()) is not trainable
        assert tree.blocks[0].ffn.router_bias.data_ptr() != model.blocks[0].ffn.router_bias.data_ptr()
