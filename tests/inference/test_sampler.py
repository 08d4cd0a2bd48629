from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.inference.sampler import Sampling, kept, pick

logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(torch.tensor)
temperatures = st.floats(0.1, 5)


@given(logits, st.integers(0, 99))
def test_temperature_zero_is_the_argmax_and_takes_no_chance(logits_V: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = generator.get_state()
    assert pick(logits_V, Sampling(temperature=0.0), generator) == int(logits_V.argmax())
    assert torch.equal(generator.get_state(), before)


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


def test_drawn_frequencies_follow_the_kept_probabilities() -> None:
    logits_V, sampling = torch.tensor([2.0, 0.0, 1.0, -3.0]), Sampling(temperature=1.0, top_k=3, seed=5)
    generator = sampling.generator()
    drawn = torch.tensor([pick(logits_V, sampling, generator) for _ in range(4000)])
    wanted = torch.tensor([2.0, 0.0, 1.0]).softmax(0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4)[:3] / 4000, wanted, atol=0.03, rtol=0)
    assert not (drawn == 3).any()


def test_the_same_seed_draws_the_same_and_each_sequence_its_own() -> None:
    sampling = Sampling(seed=7)
    logits_V = torch.zeros(100)

    def draw(sequence: int) -> list[int]:
        generator = sampling.generator(sequence)
        return [pick(logits_V, sampling, generator) for _ in range(20)]

    assert draw(0) == draw(0) != draw(1)


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
    ],
)
def test_impossible_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        Sampling(**{name: value})
