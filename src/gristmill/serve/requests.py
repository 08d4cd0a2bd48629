"""From a checked body to what the engine is asked for: ids, sampling, limits. Nothing here knows HTTP."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gristmill.errors import InputError
from gristmill.inference import ANY_OBJECT, Grammar, JsonSchema, Request, Sampling
from gristmill.inference.sampler import PARAMETERS
from gristmill.inference.settings import API_DEFAULTS
from gristmill.serve.errors import ApiError
from gristmill.serve.load import Served
from gristmill.serve.schema import ChatBody, CompletionBody, ResponseFormat, Sampled, Stops, TokenizeBody

COMPLETION_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True)
class Limits:
    """Who asks, and for how much: answers of one request, and tokens of all of them where the request says nothing."""

    tenant: str
    max_sequences: int
    most_tokens: int | None


def completion_prompts(body: CompletionBody, served: Served) -> list[Sequence[int]]:
    """The ids of each prompt. A text gets the tokenizer's start token, if it has one; ids are taken as they are."""
    given = body.prompt
    if isinstance(given, str):
        return [text_prompt(given, served)]
    if isinstance(given[0], int):
        return [given]
    return [text_prompt(one, served) if isinstance(one, str) else one for one in given]


def text_prompt(text: str, served: Served) -> Sequence[int]:
    """Raises ApiError for an empty text where the tokenizer has no start token."""
    ids = served.tokenizer.encode_prompt(text)
    if not ids:
        raise ApiError(
            400, "the prompt is empty, and this model's tokenizer adds no start token; give some text", param="prompt"
        )
    return ids


def chat_prompt(body: ChatBody | TokenizeBody, served: Served) -> Sequence[int]:
    """Raises ApiError when the model holds no conversations."""
    if served.no_chat is not None:
        raise ApiError(400, served.no_chat, param="messages", code="no_chat_template")
    roles = {"developer": "system"}  # OpenAI's newer name of it
    turns = [{"role": roles.get(m.role, m.role), "content": m.text} for m in body.messages or ()]
    return served.tokenizer.chat(turns, generation_prompt=True)


def engine_requests(
    body: CompletionBody | ChatBody, prompts: Sequence[Sequence[int]], served: Served, limits: "Limits"
) -> list[Request]:
    """One for each prompt. Raises ApiError for what does not fit, InputError for what the engine's checks refuse."""
    n = body.n or 1
    if len(prompts) * n > limits.max_sequences:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n={n} are {len(prompts) * n} answers, of at most {limits.max_sequences}; "
            "split the request",
            param="n",
        )
    if isinstance(body, ChatBody):
        param, echo, grammar = "messages", False, grammar_of(body.response_format)
        max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        param, echo, grammar = "prompt", bool(body.echo), None
        max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        logprobs = body.logprobs
    if body.return_experts and served.experts is None:
        raise ApiError(400, "this model is dense: it has no experts", param="return_experts", code="no_experts")
    sampling, stop = sampling_of(body, served), stops(body.stop)
    most = served.context if limits.most_tokens is None else max(1, limits.most_tokens // (len(prompts) * n))
    return [
        Request(
            prompt=prompt,
            max_tokens=room(prompt, max_tokens, param, served, most),
            sampling=sampling,
            n=n,
            stop_ids=stop_ids(body, served, stop),
            stop=stop,
            skip_control=body.skip_special_tokens is not False,
            grammar=grammar,
            logprobs=logprobs,
            echo=echo,
            experts=bool(body.return_experts),
            tenant=limits.tenant,
        )
        for prompt in prompts
    ]


def stop_ids(body: Sampled, served: Served, stop: Sequence[str]) -> frozenset[int]:
    """Ids that end an answer: the model's own unless the request ignores them, and control tokens named in `stop`."""
    ends = served.published.stop_ids | {served.tokenizer.eot_id, served.tokenizer.im_end_id}
    named = {id for name, id in served.tokenizer.control_tokens.items() if name in stop}
    return frozenset(named if body.ignore_eos else named | ends)


def room(ids: Sequence[int], max_tokens: int | None, param: str, served: Served, most: int) -> int:
    """max_tokens, or all that there is room for, at most `most`."""
    if len(ids) + (max_tokens or 0) > served.context or len(ids) >= served.context:
        raise ApiError(
            400,
            f"the model's context is {served.context} tokens; the prompt has {len(ids)}"
            + (f" and {max_tokens} new ones are asked for" if max_tokens else "")
            + ": shorten the prompt or lower max_tokens",
            param=param,
            code="context_length_exceeded",
        )
    return min(most, served.context - len(ids)) if max_tokens is None else max_tokens


def sampling_of(body: Sampled, served: Served) -> Sampling:
    """Return the sampling of a request, which is random unless it gives a seed."""
    given = {name: getattr(body, name) for name in PARAMETERS}
    given["seed"] = secrets.randbits(63) if given["seed"] is None else given["seed"] % 2**63
    logit_bias = {int(id): bias for id, bias in (body.logit_bias or {}).items()}
    return replace(served.published.sampling(given, API_DEFAULTS), logit_bias=logit_bias)


def stops(given: Stops | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def grammar_of(format: ResponseFormat | None) -> Grammar | None:
    """The form that an answer must have. Raises ApiError for a schema beyond the limits."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return ANY_OBJECT
    assert format.json_schema is not None
    try:
        return JsonSchema({} if format.json_schema.schema_ is None else format.json_schema.schema_)
    except InputError as problem:
        raise ApiError(400, str(problem), param="response_format") from None
