from itertools import accumulate, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.inference.sampler import History, Sampling, adjusted, chance, kept, pick

logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(torch.tensor)
temperatures = st.floats(0.1, 5)


@given(logits, st.floats(0, 1, exclude_max=True))
def test_temperature_zero_is_the_argmax_whatever_chance_says(logits_V: torch.Tensor, number: float) -> None:
    assert pick(logits_V, Sampling(temperature=0.0), number) == int(logits_V.argmax())


@given(logits, temperatures, st.integers(1, 40))
def test_top_k_keeps_the_k_largest_logits_and_what_equals_the_last(
    logits_V: torch.Tensor, temperature: float, k: int
) -> None:
    ids, probs = kept(logits_V, Sampling(temperature=temperature, top_k=k))
    descending = sorted(logits_V.tolist(), reverse=True)
    assert set(ids.tolist()) == {i for i, x in enumerate(logits_V.tolist()) if x >= descending[:k][-1]}
    assert len(ids) == len(set(ids.tolist())) >= min(k, len(logits_V))
    assert logits_V[ids].tolist() == descending[: len(ids)]
    assert float(probs.sum()) == pytest.approx(1)


@given(logits, temperatures, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits_V: torch.Tensor, temperature: float, p: float) -> None:
    everything = sorted((logits_V.double() / temperature).softmax(0).tolist(), reverse=True)
    sums = list(accumulate(everything))
    fewest, most = (next((n for n, x in enumerate(sums, 1) if x >= p + e), len(sums)) for e in (-1e-9, 1e-9))
    ids, probs = kept(logits_V, Sampling(temperature=temperature, top_p=p))
    assert fewest <= len(ids) <= most  # where a sum is as near to p as that, rounding may fall on either side
    assert logits_V[ids].tolist() == sorted(logits_V.tolist(), reverse=True)[: len(ids)]
    assert probs.tolist() == pytest.approx([x / sum(everything[: len(ids)]) for x in everything[: len(ids)]])


def test_without_filters_the_probabilities_are_the_softmax() -> None:
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(1))
    ids, probs = kept(logits_V, Sampling(temperature=0.7))
    back = torch.zeros(50, dtype=torch.float64).scatter_(0, ids, probs)
    torch.testing.assert_close(back, (logits_V.double() / 0.7).softmax(0))


@given(
    st.integers(0, 2**20), st.integers(1, 5000), st.sampled_from((0.0, 1.0, 8.0)), st.floats(0, 1, exclude_max=True),
    st.builds(
        Sampling,
        temperature=st.sampled_from((0.3, 1.0, 3.0)),
        top_k=st.sampled_from((None, 1, 300)),
        top_p=st.sampled_from((0.5, 0.99, 1.0)),
        min_p=st.sampled_from((0.0, 0.01)),
    ),
)  # fmt: skip
def test_of_many_tokens_the_one_is_drawn_that_sorting_all_of_them_gives(
    seed: int, V: int, spread: float, number: float, sampling: Sampling
) -> None:
    """Many of them equal, some of them forbidden."""
    generator = torch.Generator().manual_seed(seed)
    logits_V = (torch.randn(V, generator=generator) * spread).round(decimals=1)
    logits_V[torch.rand(V, generator=generator) < 0.3] = -torch.inf
    logits_V[seed % V] = 1.0
    ids, probs = kept(logits_V, sampling)
    assert ids.tolist() == sorted(ids.tolist(), key=lambda id: (-float(logits_V[id]), id))
    sums = probs.cumsum(0)
    possible = {int(ids[min(int((sums <= at).sum()), len(ids) - 1)]) for at in (number - 1e-12, number, number + 1e-12)}
    assert pick(logits_V, sampling, number) in possible  # the last bit of a sum may differ


def test_drawn_frequencies_follow_the_kept_probabilities() -> None:
    logits_V, sampling = torch.tensor([2.0, 0.0, 1.0, -3.0]), Sampling(temperature=1.0, top_k=3)
    drawn = torch.tensor([pick(logits_V, sampling, chance(5, 0, position)) for position in range(4000)])
    wanted = torch.tensor([2.0, 0.0, 1.0]).softmax(0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4)[:3] / 4000, wanted, atol=0.03, rtol=0)
    assert not (drawn == 3).any()


def test_chance_is_uniform_and_another_for_each_seed_choice_and_position() -> None:
    numbers = [chance(*at) for at in product(range(10), range(10), range(40))]
    assert len(set(numbers)) == 4000
    assert all(0 <= number < 1 for number in numbers)
    counts = torch.histc(torch.tensor(numbers), 10, 0, 1)
    assert float(((counts - 400) ** 2 / 400).sum()) < 28  # chi-squared of 9 degrees: once in a thousand
    assert chance(3, 1, 4) == chance(3, 1, 4)


@given(logits, temperatures, st.floats(0.01, 1))
def test_min_p_keeps_what_is_p_times_as_probable_as_the_first(
    logits_V: torch.Tensor, temperature: float, p: float
) -> None:
    probs = (logits_V.double() / temperature).softmax(0)
    ids, left = kept(logits_V, Sampling(temperature=temperature, min_p=p))
    surely, perhaps = ({i for i, x in enumerate(probs) if x >= p * probs.max() * (1 + e)} for e in (1e-9, -1e-9))
    assert surely <= set(ids.tolist()) <= perhaps
    assert left.tolist() == pytest.approx((probs[ids] / probs[ids].sum()).tolist())


@given(
    logits, st.lists(st.integers(0, 29)), st.lists(st.integers(0, 29)), *(st.floats(-2, 2) for _ in range(2)),
    st.floats(0.5, 2), st.dictionaries(st.integers(0, 29), st.floats(-5, 5)),
)  # fmt: skip
def test_bias_and_penalties_equal_a_loop_over_the_ids(
    logits_V: torch.Tensor,
    prompt: list[int],
    made: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    size = len(logits_V)
    prompt, made = [id % size for id in prompt], [id % size for id in made]
    bias = {id: value for id, value in bias.items() if id < size}
    sampling = Sampling(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, logit_bias=bias
    )
    history = History(prompt, size)
    for id in made:
        history.add(id)
    wanted = []
    for id, logit in enumerate(logits_V.tolist()):
        logit += bias.get(id, 0.0)
        if id in prompt + made:
            logit = logit * repetition if logit < 0 else logit / repetition
        wanted.append(logit - presence * (id in made) - frequency * made.count(id))
    assert adjusted(logits_V, sampling, history).tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", 1e-300),
        ("top_k", 0),
        ("top_p", 0.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("min_p", 1.5),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", 101.0),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: float("inf")}),
    ],
)
def test_impossible_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        Sampling(**{name: value})
