"""Continues prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from gristmill.inference.engine import Engine, Stream
from gristmill.inference.grammar import Grammar
from gristmill.inference.requests import Request
from gristmill.inference.sampler import Sampling
from gristmill.inference.scheduler import EngineConfig
from gristmill.model import Transformer
from gristmill.tokenizer import Tokenizer

CACHE_TOKENS = 65536  # at most; sequences that need more together take turns


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """New ids one by one: until `max_tokens`, an id of `stop_ids` (not yielded), or the model's context is full."""
    [stream] = _submit(model, [prompt_ids], sampling, max_tokens, stop_ids)
    for piece in stream:
        yield from (token.id for token in piece.tokens if token.id not in stop_ids)


def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """The same for many prompts together. Number i draws with the seed `sampling.seed` + i."""
    streams = _submit(model, prompts, sampling, max_tokens, stop_ids)
    return [[t.id for piece in stream for t in piece.tokens if t.id not in stop_ids] for stream in streams]


def stream(
    engine: Engine,
    prompt: str | Sequence[Mapping[str, str]],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    grammar: Grammar | None = None,
) -> Iterator[str]:
    """What comes after the prompt as it is made, in pieces of whole characters.

    prompt: a text to continue, or the messages of a conversation whose next turn is the assistant's. It ends with the
    document or the turn, or at one of `stop_ids`. grammar: the form that it has. engine: one with a tokenizer.
    """
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    ids = prompt_ids(tokenizer, prompt)
    stops = stop_ids | {tokenizer.eot_id, tokenizer.im_end_id}
    max_tokens = max(0, min(max_tokens, engine.model.cfg.max_seq_len - len(ids)))
    request = Request(prompt=ids, max_tokens=max_tokens, sampling=sampling, stop_ids=stops, grammar=grammar)
    answer = engine.submit(request)  # now, not in a generator: an error must come before the caller prints anything
    return (piece.text for piece in answer if piece.text)


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a text to continue, or of a conversation up to the assistant's next turn."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    return tokenizer.chat(prompt, generation_prompt=True)


def _submit(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int],
) -> list[Stream]:
    """To an engine whose cache has room for all of them, or for what CACHE_TOKENS allows."""
    requests = [
        Request(
            prompt=prompt,
            max_tokens=max(0, min(max_tokens, model.cfg.max_seq_len - len(prompt))),
            sampling=replace(sampling, seed=(sampling.seed + number) % 2**63),
            stop_ids=stop_ids,
        )
        for number, prompt in enumerate(prompts)
    ]
    block = EngineConfig.block_tokens
    needs = [-(-(len(r.prompt) + (r.max_tokens or 0)) // block) * block for r in requests]
    cache_tokens = max(max(needs, default=0), min(sum(needs), CACHE_TOKENS), block)
    engine = Engine(model, EngineConfig(cache_tokens=cache_tokens, max_waiting=max(1, len(prompts))))
    return [engine.submit(request) for request in requests]
