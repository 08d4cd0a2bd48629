"""The engine's greedy text is transformers', and has the same ids and the same log-probabilities to the last bit
however it is made: alone, among others, in chunks, thrown out and taken in again, or from a known prefix."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from both import Both, compare_greedy, counts
from random_models import COUNT, LAYOUTS, draw

from gristmill.inference import Engine, EngineConfig, Request, Sampling, Stream, Token

NEW = 24


@pytest.fixture(
    scope="module", params=[(x, seed) for x in LAYOUTS for seed in range(COUNT)], ids=lambda x: f"{x[0]}-{x[1]}"
)
def pair(request: pytest.FixtureRequest) -> Iterator[Both]:
    with tempfile.TemporaryDirectory() as folder:
        yield Both(draw(*request.param), Path(folder))


def ask(engine: Engine, prompt: list[int], max_tokens: int = NEW, priority: int = 0) -> Stream:
    greedy = Sampling(temperature=0.0)
    return engine.submit(Request(prompt=prompt, max_tokens=max_tokens, sampling=greedy, logprobs=3, priority=priority))


def tokens(stream: Stream) -> list[Token]:
    return [token for piece in stream for token in piece.tokens]


def test_greedy_text_is_transformers_and_the_same_bits_however_it_is_made(pair: Both) -> None:
    prompt = (pair.documents[0] * 40)[: max(37, len(pair.documents[0]))]
    others = [*pair.documents[1:], prompt[5:25], prompt[:1], prompt[:30]]

    def engine(**changes: int) -> Engine:
        return Engine(pair.ours, EngineConfig(**{"cache_tokens": 2048, **changes}))  # type: ignore[arg-type]

    alone = tokens(ask(engine(), prompt))
    outcome = compare_greedy(pair, prompt, [token.id for token in alone])
    counts[f"{pair.case.layout}: engine's greedy {outcome}"] += 1

    for batch in (engine(), engine(token_budget=9, max_running=8)):  # whole prompts, and chunks beside decoding
        for other in others[:-1]:
            ask(batch, other)
        stream = ask(batch, prompt)
        ask(batch, others[-1])
        assert tokens(stream) == alone

    crowded = engine(cache_tokens=-(-(len(prompt) + NEW) // 16) * 16)
    stream = ask(crowded, prompt, priority=1)
    for _ in range(9):
        crowded.step()
    ask(crowded, [(prompt[0] + 1) % pair.ours.wte.num_embeddings, *prompt[1:]], max_tokens=2)  # which shares no block
    assert tokens(stream) == alone
    assert stream.choices[0].job.num_preemptions == 1

    known = engine()
    tokens(ask(known, prompt[: len(prompt) // 2]))
    tokens(ask(known, prompt))
    stream = ask(known, prompt)
    assert known.scheduler.schedule().parts[0].start == (len(prompt) - 1) // 16 * 16  # all blocks but the last one
    assert tokens(stream) == alone
