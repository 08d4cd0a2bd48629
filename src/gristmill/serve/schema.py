"""What may be asked for: the bodies of requests. Everything in them is honoured or refused by name; nothing is ignored.

`parse` turns bytes into one of the models below or raises an ApiError that names the parameter. Strict: a number in a
string is not a number. Of parameters that OpenAI has and this server has not, REFUSED says why; their values that mean
"nothing special" are accepted, as clients send them by themselves.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import from_json

from gristmill.inference.sampler import PARAMETERS
from gristmill.serve.errors import ApiError

MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_PROMPTS, MAX_MESSAGES = 16, 256, 1024, 128, 4096

NO_TOOLS = "the model's chat template has no place for tools"
NO_STORE = "nothing is stored here"
TEXT_ONLY = "the model reads and writes text alone"
# Parameter: (values that change nothing, why others are refused).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), TEXT_ONLY),
    "function_call": (("none",), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "metadata": (({},), NO_STORE),
    "modalities": ((["text"],), TEXT_ONLY),
    "moderation": ((), "nothing is moderated here"),
    "parallel_tool_calls": ((True, False), NO_TOOLS),
    "prediction": ((), "decoding is not speculative here"),
    "prompt_cache_key": ((), "prompts that begin alike share the cache by themselves"),
    "prompt_cache_options": ((), "the cache keeps what was used last"),
    "prompt_cache_retention": (("in_memory",), "the cache is in memory and keeps what was used last"),
    "reasoning_effort": (("none",), "the model has no reasoning to be set"),
    "safety_identifier": ((), "use user for a label"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), NO_STORE),
    "suffix": (("",), "the model is not asked to fill in the middle"),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "tools": (([],), NO_TOOLS),
    "verbosity": (("medium",), "say it in the prompt"),
    "web_search_options": ((), "the server asks no other"),
}
# The same in a message: fields that clients send back from an answer.
REFUSED_IN_MESSAGES: dict[str, tuple[tuple[Any, ...], str]] = {
    "annotations": (([],), NO_TOOLS),
    "audio": ((), TEXT_ONLY),
    "function_call": ((), NO_TOOLS),
    "name": ((), "the chat template has no place for names; say it in the content"),
    "refusal": (("",), "give it as content"),
    "tool_call_id": ((), NO_TOOLS),
    "tool_calls": (([],), NO_TOOLS),
}


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _not_too_many(biases: Any) -> Any:
    """Before each of a million wrong ones is complained about."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise Misfit("logit_bias", f"logit_bias has {len(biases)} ids, of at most {MAX_BIASES}")
    return biases


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Label = Annotated[str, Field(max_length=256)]


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="Whether a last chunk tells the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="Whether each chunk tells the usage so far, of all answers together."
    )
    include_obfuscation: Literal[False] | None = Field(None, description="Nothing is padded here.")


class Sampled(Body):
    """The parameters that completions and chat completions share. null is as if it was left out."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_not_too_many), Field(max_length=MAX_BIASES)] | None = Field(
        None, description="What is added to the logits of token ids."
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: int | None = Field(None, description="As many as n: the server does not choose among answers.")
    stop: Stops | None = None
    ignore_eos: bool | None = Field(
        None, description="Whether to go on to max_tokens (or a stop text) where the model would end its answer."
    )
    skip_special_tokens: bool | None = Field(
        None, description="Whether to leave control tokens out of texts. Default: true."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_experts: bool | None = Field(
        None, description="Whether each token tells the experts of the pass that predicted it, layer by layer."
    )
    user: Label | None = Field(None, description="A label of the caller's own; it changes nothing.")

    @model_validator(mode="after")
    def _agree(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise Misfit("stream_options", "stream_options is for streams; set stream to true or leave it out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Misfit(
                "best_of",
                f"best_of={self.best_of} must equal n={self.n or 1}: the server does not choose among answers; ask for "
                "n answers with logprobs and choose among them",
            )
        for id in self.logit_bias or {}:
            if not (id.isascii() and id.isdigit() and len(id) < 10):
                raise Misfit("logit_bias", f"logit_bias has the key {id!r:.80}; its keys must be token ids")
        return self


T = TypeVar("T", bound=type[Sampled])


def with_sampling(kind: T) -> T:
    """Return the body with a field for each parameter of the table of sampling parameters."""
    fields: dict[str, Any] = {}
    for name, parameter in PARAMETERS.items():
        bounds = parameter.api_bounds
        rules: dict[str, Any] = {"gt" if bounds.excludes_low else "ge": bounds.low}
        if bounds.high < math.inf:
            rules["le"] = bounds.high
        fields[name] = parameter.kind | None, Field(None, description=parameter.api_help, **rules)
    return create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **fields)  # type: ignore[return-value]


@with_sampling
class CompletionBody(Sampled):
    """`prompt`: a text gets the tokenizer's start token, if it has one; ids are taken as they are."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="Default: 16.")
    echo: bool | None = Field(None, description="Whether the prompt comes first.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="How many of the most probable tokens are told beside each one's own log-probability."
    )


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class JsonSchema(Body):
    """name, description: labels; the model sees the messages alone. strict: answers always are."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _one(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Misfit("response_format", "response_format has json_schema exactly when its type is json_schema")
        return self


@with_sampling
class ChatBody(Sampled):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The older name of max_completion_tokens.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Default: as many as there is room for."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _agree_in_chat(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise Misfit("top_logprobs", "top_logprobs needs logprobs; set it to true or leave both out")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Misfit("max_tokens", "max_tokens is the older name of max_completion_tokens; give one of them")
        if self.ignore_eos and self.response_format is not None and self.response_format.type != "text":
            raise Misfit(
                "ignore_eos",
                "ignore_eos cannot be combined with response_format, as JSON ends by itself; leave one out",
            )
        return self


class TokenizeBody(Body):
    """A text of a completion, or the messages of a chat: their ids are those that would be computed."""

    model: str
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="For prompt: add the tokenizer's start token. Default: true."
    )
    return_token_strs: bool | None = Field(None, description="Whether each token's text is told too.")

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise Misfit("prompt", "give either prompt or messages")
        if self.messages is not None and self.add_special_tokens is False:
            raise Misfit("add_special_tokens", "a chat has its special tokens always; leave add_special_tokens out")
        return self


class DetokenizeBody(Body):
    model: str
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


class Misfit(ValueError):
    """Two parameters that do not go together."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


B = TypeVar("B", bound=Body)
# In words, where a parameter may be of several forms, each of which would complain.
FORMS = {
    "prompt": f"a text, at most {MAX_PROMPTS} texts, a list of token ids, or at most {MAX_PROMPTS} of those",
    "stop": f"a text or at most {MAX_STOPS} of them, each of 1 to {MAX_STOP_LENGTH} characters",
    "content": 'a text, or parts of the form {"type": "text", "text": …}',
}


def parse(kind: type[B], body: bytes) -> B:
    """Raises ApiError 400 for what is no JSON object or has a wrong, unknown or refused parameter."""
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as problem:
        raise ApiError(400, f"the body must be JSON in UTF-8: {problem}") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_kind(given)}")
    given = _without_refused(kind, given, REFUSED, None)
    if isinstance(messages := given.get("messages"), list):
        given["messages"] = [
            _without_refused(Message, message, REFUSED_IN_MESSAGES, f"messages[{number}]")
            if isinstance(message, dict)
            else message
            for number, message in enumerate(messages)
        ]
    try:
        return kind.model_validate(given)
    except ValidationError as problem:
        raise _told(problem) from None


def _without_refused(
    kind: type[BaseModel],
    given: Mapping[str, Any],
    refused: Mapping[str, tuple[tuple[Any, ...], str]],
    where: str | None,
) -> dict[str, Any]:
    kept = {}
    names = {field.alias or name for name, field in kind.model_fields.items()}
    for name, value in given.items():
        param = f"{where}.{name}" if where else name
        if name in names:
            kept[name] = value
        elif name not in refused:
            known = ", ".join(sorted(names))
            raise ApiError(
                400, f"{param:.200} is not a parameter; there are {known}", param=param[:200], code="unknown"
            )
        elif value is not None and not any(type(value) is type(v) and value == v for v in refused[name][0]):
            raise ApiError(
                400, f"{param} is not supported: {refused[name][1]}", param=param, code="unsupported_parameter"
            )
    return kept


def _told(problem: ValidationError) -> ApiError:
    """The first complaint: which parameter, the rule, and what was given."""
    first = problem.errors(include_url=False, include_context=True, include_input=True)[0]
    misfit = first.get("ctx", {}).get("error")
    if isinstance(misfit, Misfit):
        return ApiError(400, str(misfit), param=misfit.param)
    param, form = "", ""
    for step in first["loc"]:
        if isinstance(step, int):
            param += f"[{step}]"
        else:
            param += f".{step}" if param else step
            form = step
        if form in FORMS:  # what follows is one of its forms
            return ApiError(400, f"{param} must be {FORMS[form]}", param=param)
    given = first["input"]
    shown = "" if first["type"] == "missing" or isinstance(given, dict | list) else f"; it is {given!r:.80}"
    return ApiError(400, f"{param:.200}: {_decapitalized(first['msg'])}{shown}", param=param[:200])


def _decapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
