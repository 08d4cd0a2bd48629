"""Turns a checked body into requests for the engine: ids, sampling, lengths. Nothing here knows HTTP."""

import secrets
from collections.abc import Sequence
from dataclasses import replace

from gristmill.errors import InputError
from gristmill.inference import ANY_OBJECT, Grammar, JsonSchema, Request, Sampling
from gristmill.inference.sampler import PARAMETERS
from gristmill.inference.settings import API_DEFAULTS
from gristmill.serve.config import MAX_ANSWERS
from gristmill.serve.errors import ApiError
from gristmill.serve.load import Served
from gristmill.serve.schema import ChatBody, CompletionBody, ResponseFormat, Sampled, Stops, TokenizeBody

COMPLETION_TOKENS = 16  # OpenAI's default


def completion_prompts(body: CompletionBody, served: Served) -> list[Sequence[int]]:
    """Return the ids of each prompt. A text gets the tokenizer's start token, if it has one; ids stay as they are."""
    given = body.prompt
    if isinstance(given, str):
        return [served.tokenizer.encode_prompt(given)]
    if isinstance(given[0], int):
        return [given]
    return [served.tokenizer.encode_prompt(one) if isinstance(one, str) else one for one in given]


def chat_prompt(body: ChatBody | TokenizeBody, served: Served) -> Sequence[int]:
    """Return the ids of a conversation. Raises ApiError when the model has no chat template."""
    if served.no_chat is not None:
        raise ApiError(400, served.no_chat, param="messages", code="no_chat_template")
    roles = {"developer": "system"}  # OpenAI's newer name of it
    turns = [{"role": roles.get(m.role, m.role), "content": m.text} for m in body.messages or ()]
    return served.tokenizer.chat(turns, generation_prompt=True)


def engine_requests(
    body: CompletionBody | ChatBody,
    prompts: Sequence[Sequence[int]],
    served: Served,
    tenant: str,
    most_tokens: int | None,
) -> list[Request]:
    """Return a request for each prompt.

    Args:
        most_tokens: of all answers together, when the body gives no number; None has no bound.

    Raises ApiError, or SettingError for a request that the engine refuses.
    """
    num_answers = len(prompts) * (n := body.n or 1)
    if num_answers > MAX_ANSWERS:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n={n} are {num_answers} answers, of at most {MAX_ANSWERS}; split the request",
            param="n",
        )
    if isinstance(body, ChatBody):
        echo, grammar = False, grammar_of(body.response_format)
        max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        echo, grammar = bool(body.echo), None
        max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        logprobs = body.logprobs
    sampling, stop = sampling_of(body, served), stops(body.stop)
    most = served.context if most_tokens is None else max(1, most_tokens // num_answers)
    found = [
        Request(
            prompt=prompt,
            max_tokens=default_tokens(prompt, served, most) if max_tokens is None else max_tokens,
            sampling=sampling,
            n=n,
            stop_ids=stop_ids(body, served, stop),
            stop=stop,
            skip_control=body.skip_special_tokens is not False,
            grammar=grammar,
            logprobs=logprobs,
            echo=echo,
            experts=bool(body.return_experts),
            tenant=tenant,
        )
        for prompt in prompts
    ]
    for request in found:
        served.engine.check(request)
    return found


def default_tokens(prompt: Sequence[int], served: Served, most: int) -> int | None:
    """Return the new tokens that fit, at most `most`; None when the prompt does not fit, which the engine refuses."""
    free = served.context - len(prompt)
    return min(most, free) if free > 0 else None


def stop_ids(body: Sampled, served: Served, stop: Sequence[str]) -> frozenset[int]:
    """Ids that end an answer: the model's own unless the request ignores them, and control tokens named in `stop`."""
    ends = served.published.stop_ids | {served.tokenizer.eot_id, served.tokenizer.im_end_id}
    named = {id for name, id in served.tokenizer.control_tokens.items() if name in stop}
    return frozenset(named if body.ignore_eos else named | ends)


def sampling_of(body: Sampled, served: Served) -> Sampling:
    """Return the sampling of a request, which is random unless it gives a seed."""
    given = {name: getattr(body, name) for name in PARAMETERS}
    given["seed"] = secrets.randbits(63) if given["seed"] is None else given["seed"] % 2**63
    logit_bias = {int(id): bias for id, bias in (body.logit_bias or {}).items()}
    return replace(served.published.sampling(given, API_DEFAULTS), logit_bias=logit_bias)


def stops(given: Stops | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def grammar_of(format: ResponseFormat | None) -> Grammar | None:
    """Return the grammar of an answer; None is any text. Raises ApiError for a schema beyond the limits."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return ANY_OBJECT
    assert format.json_schema is not None
    try:
        return JsonSchema({} if format.json_schema.schema_ is None else format.json_schema.schema_)
    except InputError as problem:
        raise ApiError(400, str(problem), param="response_format") from None
