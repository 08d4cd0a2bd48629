from collections.abc import Callable

import pytest
import torch

from gristmill.errors import InputError
from gristmill.inference import Sampling, complete, generate
from gristmill.inference.scorer import causal
from gristmill.model import Transformer

Tiny = Callable[..., Transformer]
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[7], [11, 12, 13, 14, 15, 16, 17], [5, 250, 5]]


def whole_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    hidden, _ = model(torch.tensor([ids]), torch.arange(len(ids))[None], causal)
    return model.logits(hidden)[0]


@torch.no_grad()
def without_cache(model: Transformer, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(whole_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, {"ffn": "dense"}, {"kv_n_heads": 1, "clip_qkv": None}, {"kv_n_heads": 4}])
def test_cached_greedy_decoding_equals_recomputing_the_whole_sequence(tiny: Tiny, changes: dict) -> None:
    model = tiny(**changes)
    for prompt in PROMPTS:
        assert list(generate(model, prompt, GREEDY, 20)) == without_cache(model, prompt, 20)


def test_a_batch_of_unequal_prompts_decodes_as_each_alone(tiny: Tiny) -> None:
    model = tiny()
    for temperature in (0.0, 1.0):
        together = complete(model, PROMPTS, Sampling(temperature=temperature, top_p=0.9, seed=3), 16)
        for row, prompt in enumerate(PROMPTS):
            alone = Sampling(temperature=temperature, top_p=0.9, seed=3 + row)
            assert together[row] == list(generate(model, prompt, alone, 16))


def test_seeded_sampling_repeats_and_seeds_differ(tiny: Tiny) -> None:
    model = tiny()

    def draw(seed: int) -> list[int]:
        return list(generate(model, [1, 2], Sampling(seed=seed), 30))

    assert draw(1) == draw(1) != draw(2)


def test_generation_stops_before_a_stop_id_and_where_the_context_is_full(tiny: Tiny) -> None:
    model = tiny(max_seq_len=16)
    free = list(generate(model, [1, 2, 3], GREEDY, 100))
    assert len(free) == 16 - 3
    stop = free[5]
    assert list(generate(model, [1, 2, 3], GREEDY, 100, frozenset({stop}))) == free[: free.index(stop)]
    assert list(generate(model, [1, 2, 3], GREEDY, 4)) == free[:4]
    assert list(generate(model, [1, 2, 3], GREEDY, 0)) == []


@pytest.mark.parametrize(("prompt", "says"), [([], "no token"), ([1] * 64, "64 tokens"), ([300], "outside")])
def test_impossible_prompts_are_input_errors(tiny: Tiny, prompt: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        list(generate(tiny(), prompt, GREEDY, 3))


def test_a_model_in_training_goes_on_training(tiny: Tiny) -> None:
    model = tiny(moe_jitter_eps=0.5).train()
    assert list(generate(model, [1], GREEDY, 8)) == list(generate(model, [1], GREEDY, 8))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
