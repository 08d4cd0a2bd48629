"""Continues prompts token by token with a key/value cache."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.inference.cache import Cache
from gristmill.inference.sampler import Sampling, pick
from gristmill.model import Transformer
from gristmill.tokenizer import Tokenizer


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """New ids one by one: until `max_tokens`, an id of `stop_ids` (not yielded), or the model's context is full."""
    for (id,) in decode(model, [prompt_ids], sampling, max_tokens):
        if id in stop_ids:
            return
        yield id


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Mapping[str, str]],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[str]:
    """What comes after the prompt as it is made, in pieces of whole characters.

    prompt: a text to continue, or the messages of a conversation whose next turn is the assistant's. It ends with the
    document or the turn, or at one of `stop_ids`.
    """
    if isinstance(prompt, str):
        ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    else:
        ids = tokenizer.chat(prompt, generation_prompt=True)
    decoder = tokenizer.stream_decoder()
    stops = stop_ids | {tokenizer.eot_id, tokenizer.im_end_id}
    for id in generate(model, ids, sampling, max_tokens, stops):
        if text := decoder.feed(id):
            yield text
    if rest := decoder.flush():
        yield rest


@torch.inference_mode()
def decode(
    model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: int
) -> Iterator[list[int]]:
    """Yields the next id of every prompt, `max_tokens` times, or until the longest one fills the model's context.

    Sequence i draws from `sampling.generator(i)`. Raises InputError for an empty prompt, or one without room for
    a new token.
    """
    longest = _check(model, prompts)
    steps = min(max_tokens, model.cfg.max_seq_len - longest)
    device = model.wte.weight.device
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    positions = torch.arange(longest, device=device).expand(len(prompts), -1)
    generators = [sampling.generator(i) for i in range(len(prompts))]
    seen = _seen(prompts, model) if sampling.repetition_penalty != 1 else None  # no work for what nobody asked for
    cache = Cache(model.cfg, len(prompts), longest + steps, model.compute_dtype, device)
    for step in range(steps):
        with evaluating(model):
            hidden, _ = model(tokens, positions, cache.attend(positions))
            last = hidden[torch.arange(len(prompts)), ends - 1] if step == 0 else hidden[:, -1]
            logits = model.logits(last)
        rows = zip(logits, generators, [None] * len(prompts) if seen is None else seen, strict=True)
        ids = [pick(row, sampling, generator, seen_V) for row, generator, seen_V in rows]
        yield ids
        tokens, positions = torch.tensor(ids, device=device)[:, None], (ends + step)[:, None]
        if seen is not None:
            seen.scatter_(1, tokens, True)


def _seen(prompts: Sequence[Sequence[int]], model: Transformer) -> Tensor:
    """[B, V]: which ids each prompt has."""
    seen = torch.zeros(len(prompts), model.wte.num_embeddings, dtype=torch.bool, device=model.wte.weight.device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return seen


def _check(model: Transformer, prompts: Sequence[Sequence[int]]) -> int:
    """The longest prompt's length, if all are possible."""
    for prompt in prompts:
        if not prompt:
            raise InputError("the prompt has no token; give text, or begin with <|endoftext|>")
        if len(prompt) >= model.cfg.max_seq_len:
            raise InputError(
                f"the prompt has {len(prompt)} tokens; with max_seq_len={model.cfg.max_seq_len} it must be shorter"
            )
        if min(prompt) < 0 or max(prompt) >= model.wte.num_embeddings:
            raise InputError(
                f"the prompt has an id outside of 0 to {model.wte.num_embeddings - 1}; encode it with the model's "
                "own tokenizer"
            )
    return max(len(prompt) for prompt in prompts)


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Without jitter; a model in training goes on training afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
