"""Step by step the sampler's distribution is that of transformers' logits processors, in transformers' order.

Equal means: the same kept tokens, and probabilities within 1e-6. Left out: a step where a cumulated probability comes
so near to top_p that rounding decides (1e-9 in float64, 1e-5 in fp32). Where equal logits lie on both sides of top-p's
edge, transformers' unstable sort decides which of them stay, so there the numbers of kept tokens are compared.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gristmill.hub import in_memory, write_published
from gristmill.hub.settings import SpecialIds
from gristmill.inference import Sampling, complete, engine, generate
from gristmill.inference.sampler import History, kept, penalized, pick
from gristmill.model import Transformer

Tiny = Callable[..., Transformer]
DBRX = {"temperature": 0.7, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.01}  # as published with DBRX Instruct
SETTINGS = [
    DBRX,
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 1.0, "repetition_penalty": 1.8},
    {"temperature": 2.0, "top_p": 0.8, "top_k": 20, "repetition_penalty": 0.7},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.1},
]
PROMPTS = [[7], [11, 12, 13, 14, 15, 16, 17], [5, 250, 5]]


def processors(sampling: Sampling) -> LogitsProcessorList:
    """Those that transformers' `generate` builds for these settings; it leaves neutral ones out."""
    made: list[Any] = []
    if sampling.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    made.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        made.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        made.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        made.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(made)


def seen_in(ids: Sequence[int], vocab_size: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(ids), minlength=vocab_size) > 0


def edge_distance(logits_V: torch.Tensor, sampling: Sampling) -> float:
    """How near a cumulated probability comes to top_p, or one to min_p."""
    _, probs = kept(logits_V, Sampling(temperature=sampling.temperature, top_k=sampling.top_k))
    nucleus = 1.0 if sampling.top_p == 1 else float((probs.cumsum(0) - sampling.top_p).abs().min())
    least = 1.0 if sampling.min_p == 0 else float((probs / probs[0] - sampling.min_p).abs().min())
    return min(nucleus, least)


def assert_same_distribution(logits_V: torch.Tensor, sampling: Sampling, scores_V: torch.Tensor) -> None:
    """logits_V: after the penalty. scores_V: what transformers made of them; -inf where a token was dropped."""
    ids, probs = kept(logits_V, sampling)
    theirs = scores_V.isfinite()
    assert len(ids) == int(theirs.sum())
    ours = torch.zeros_like(theirs).scatter_(0, ids, True)
    last = logits_V[ids[-1]]
    straddling = (logits_V == last) & (ours != theirs)
    assert torch.equal(ours | straddling, theirs | straddling)
    wanted = scores_V.double().softmax(0)
    assert probs.tolist() == pytest.approx(wanted[theirs].sort(descending=True).values.tolist(), abs=1e-6)
    shared = theirs[ids]
    assert probs[shared].tolist() == pytest.approx(wanted[ids][shared].tolist(), abs=1e-6)


@given(
    st.lists(st.floats(-20, 20, width=32) | st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=60),
    st.lists(st.integers(0, 59), min_size=1, max_size=30),
    st.builds(
        Sampling,
        temperature=st.floats(0.1, 5),
        top_k=st.none() | st.integers(1, 60),
        top_p=st.floats(0.01, 1),
        min_p=st.just(0.0) | st.floats(0.01, 0.99),
        repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    ),
)
def test_any_logits_and_settings_give_the_processors_distribution(
    logits: list[float], ids: list[int], sampling: Sampling
) -> None:
    logits_V = torch.tensor(logits, dtype=torch.float64)
    ids = [id % len(logits) for id in ids]
    before = penalized(logits_V, seen_in(ids, len(logits)), sampling.repetition_penalty)
    assume(edge_distance(before, sampling) > 1e-9)
    scores = processors(sampling)(torch.tensor([ids]), logits_V[None].clone())[0]
    assert_same_distribution(before, sampling, scores)


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_step_of_a_batch_draws_from_the_processors_distribution_of_its_prefix(
    settings: dict[str, Any], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def recording(
        logits_V: torch.Tensor, sampling: Sampling, chance: float, history: History | None, allowed_V: None
    ) -> int:
        steps.append((logits_V.clone(), None if history is None else history.seen_V.clone()))
        return pick(logits_V, sampling, chance, history, allowed_V)

    monkeypatch.setattr(engine, "pick", recording)
    sampling = Sampling(seed=5, **settings)
    columns = list(zip(*complete(tiny(), PROMPTS, sampling, 24), strict=True))
    near = 0
    for number, (logits_V, seen_V) in enumerate(steps):
        step, row = divmod(number, len(PROMPTS))
        prefix = PROMPTS[row] + [column[row] for column in columns[:step]]
        after = logits_V if seen_V is None else penalized(logits_V, seen_V, sampling.repetition_penalty)
        if edge_distance(after, sampling) < 1e-5:
            near += 1
            continue
        scores = processors(sampling)(torch.tensor([prefix]), logits_V[None].clone())[0]
        assert_same_distribution(after, sampling, scores)
        assert columns[step][row] in kept(after, sampling)[0]
    assert near < len(steps) / 20
    assert list(zip(*complete(tiny(), PROMPTS, sampling, 24), strict=True)) == columns  # the seed repeats


@pytest.fixture
def theirs(tiny: Tiny, tmp_path: Path) -> Any:
    model = tiny()
    write_published(
        tmp_path, model.cfg, in_memory(model.state_dict()), SpecialIds(eot_id=292, pad_id=297, im_end_id=299)
    )
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True).eval()


def test_every_step_of_transformers_own_generate_has_our_distribution(theirs: Any) -> None:
    for settings in SETTINGS:
        sampling = Sampling(**settings)
        torch.manual_seed(0)
        made = theirs.generate(
            (prompt := torch.tensor([PROMPTS[1]])),
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            **{"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0, **settings},
            max_new_tokens=24,
            eos_token_id=-1,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for step, (logits, scores) in enumerate(zip(made.logits, made.scores, strict=True)):
            prefix = made.sequences[0, : len(PROMPTS[1]) + step].tolist()
            after = penalized(logits[0], seen_in(prefix, logits.shape[1]), sampling.repetition_penalty)
            if edge_distance(after, sampling) >= 1e-5:
                assert_same_distribution(after, sampling, scores[0])


def test_greedy_decoding_with_a_repetition_penalty_equals_transformers(tiny: Tiny, theirs: Any) -> None:
    for penalty in (1.01, 1.5, 0.8):
        for prompt in PROMPTS:
            tokens = torch.tensor([prompt])
            wanted = theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                repetition_penalty=penalty,
                max_new_tokens=24,
                eos_token_id=-1,
            )
            sampling = Sampling(temperature=0.0, repetition_penalty=penalty)
            assert list(generate(tiny(), prompt, sampling, 24)) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("logits", "settings", "number"),
    [
        ([1.0, 3.0, 1.0, 1.0, 0.0], {"top_k": 2}, 4),
        ([1.0, 3.0, 1.0, 1.0, 0.0], {"top_p": 0.85}, 3),
        ([2.0, 2.0, 2.0, 2.0], {"top_p": 0.5}, 2),  # exactly p is enough
    ],
)
def test_of_tied_logits_top_k_keeps_all_and_top_p_as_many_as_transformers(
    logits: list[float], settings: dict[str, Any], number: int
) -> None:
    logits_V, sampling = torch.tensor(logits), Sampling(**settings)
    scores = processors(sampling)(torch.tensor([[0]]), logits_V[None])[0]
    ids, _ = kept(logits_V, sampling)
    assert len(ids) == int(scores.isfinite().sum()) == number
    assert ids.tolist() == sorted(range(len(logits)), key=lambda id: (-logits[id], id))[:number]
