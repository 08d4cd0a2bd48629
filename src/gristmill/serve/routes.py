"""The routes: read a body, ask the engine, answer. What they may answer stands beside each, and is all of it."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast

from fastapi import APIRouter, Request
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response

from gristmill.errors import Failure, InputError
from gristmill.inference import Grammar
from gristmill.inference import Request as EngineRequest
from gristmill.inference.errors import SettingError
from gristmill.serve import answers, config, metrics, requests
from gristmill.serve.answers import Chat, Completion, Shape
from gristmill.serve.config import ServeConfig
from gristmill.serve.errors import ApiError, ErrorBody, overloaded
from gristmill.serve.gate import Gate
from gristmill.serve.load import Served
from gristmill.serve.respond import Answer, while_connected
from gristmill.serve.schema import Body, ChatBody, CompletionBody, DetokenizeBody, Sampled, TokenizeBody, parse
from gristmill.serve.usage import plain
from gristmill.serve.worker import Worker

INLINE_BYTES = 16384  # larger bodies are parsed and encoded beside the event loop, which has others to serve
# The API's names of the engine's settings.
PARAMS = {"grammar": "response_format", "experts": "return_experts"}
B = TypeVar("B", bound=Body)


@dataclass(kw_only=True)
class Endpoint:
    """What all routes share."""

    served: Served
    cfg: ServeConfig
    gate: Gate
    worker: Worker
    metrics: metrics.Metrics
    created: int
    compiler: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "grammars"))
    reader: Executor = field(default_factory=lambda: ThreadPoolExecutor(2, "bodies"))
    num_requests: int = 0
    is_draining: bool = False


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a route, for the schema."""
    said = {
        400: "A wrong, unknown or refused parameter; a header that is too large.",
        401: "No key, or one that is not known.",
        403: "Without keys, a Host that is not this machine's own name; with keys, one without the scope needed.",
        404: "No such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        415: "The body is not application/json.",
        429: "A limit of the key; Retry-After says when to try again.",
        500: "A mistake of the server.",
        503: "Full, or shutting down; Retry-After says when to try again.",
        504: "The answer was not complete within the server's limit.",
    }
    return {status: {"model": ErrorBody, "description": said[status]} for status in statuses}


ALL = (400, 403, 500, 503)
EACH = (*ALL, 401)
ASKING = (*EACH, 404, 408, 413, 415)
router = APIRouter()


def endpoint(request: Request) -> Endpoint:
    return cast(Endpoint, cast(State, request.app.state).endpoint)


def body_of(kind: type[Body]) -> dict[str, Any]:
    """For the schema: a route's body, which `read` reads."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def streams(kind: type[Any]) -> dict[int | str, dict[str, Any]]:
    json = {"type": "string", "contentMediaType": "application/json"}
    of = [json | {"contentSchema": {"$ref": f"#/components/schemas/{name.__name__}"}} for name in (kind, ErrorBody)]
    item = {"type": "object", "properties": {"data": {"anyOf": [*of, {"const": "[DONE]"}]}}}
    return {200: {"description": "The answers.", "content": {"text/event-stream": {"itemSchema": item}}}}


@router.post(
    "/v1/completions",
    response_model=answers.CompletionAnswer,
    responses={**streams(answers.CompletionAnswer), **errors(*ASKING, 429, 504)},
    openapi_extra=body_of(CompletionBody),
)
async def completions(request: Request) -> Response:
    """Continue texts."""
    at = endpoint(request)
    body = await read(request, CompletionBody)
    prompts = await beside(request, requests.completion_prompts, body, at.served)
    asked = requests.engine_requests(body, prompts, at.served, *asker(request))
    return await ask(request, body, asked, Completion(at.cfg.name, at.served.tokenizer, asked[0]))


@router.post(
    "/v1/chat/completions",
    response_model=answers.ChatAnswer,
    responses={**streams(answers.ChatChunk), **errors(*ASKING, 429, 504)},
    openapi_extra=body_of(ChatBody),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    at = endpoint(request)
    body = await read(request, ChatBody)
    prompt = await beside(request, requests.chat_prompt, body, at.served)
    asked = requests.engine_requests(body, [prompt], at.served, *asker(request))
    if (grammar := asked[0].grammar) is not None:
        await compiled(grammar, at)
    return await ask(request, body, asked, Chat(at.cfg.name, at.served.tokenizer, asked[0]))


@router.post(
    "/v1/tokenize",
    response_model=answers.Tokenized,
    responses=errors(*ASKING),
    openapi_extra=body_of(TokenizeBody),
)
async def tokenize(request: Request) -> Response:
    """The ids of a text or a conversation."""
    served = endpoint(request).served
    body = await read(request, TokenizeBody)
    if body.prompt is None:
        ids = await beside(request, requests.chat_prompt, body, served)
    else:
        encode = served.tokenizer.encode if body.add_special_tokens is False else served.tokenizer.encode_prompt
        ids = await beside(request, encode, body.prompt)
    texts = [answers.token_text(served.tokenizer, id) for id in ids] if body.return_token_strs else None
    told = {"count": len(ids), "max_model_len": served.context, "tokens": ids, "token_strs": texts}
    return JSONResponse(told)


@router.post(
    "/v1/detokenize",
    response_model=answers.Detokenized,
    responses=errors(*ASKING),
    openapi_extra=body_of(DetokenizeBody),
)
async def detokenize(request: Request) -> Response:
    """The text of ids."""
    served = endpoint(request).served
    body = await read(request, DetokenizeBody)
    if body.tokens and max(body.tokens) >= served.vocab_size:
        raise ApiError(400, f"tokens has an id above the model's last, {served.vocab_size - 1}", param="tokens")
    return JSONResponse({"prompt": served.tokenizer.decode(body.tokens)})


@router.get("/v1/models", response_model=answers.Models, responses=errors(*EACH))
async def models(request: Request) -> Response:
    """The model that is served."""
    return JSONResponse({"object": "list", "data": [model_card(request)]})


@router.get(
    "/v1/models/{model:path}",
    response_model=answers.Model,
    responses=errors(*EACH, 404),
    openapi_extra={"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]},
)
async def model(request: Request) -> Response:
    """One model, by its id."""
    known(request.path_params["model"], endpoint(request))
    return JSONResponse(model_card(request))


@router.get("/v1/usage", response_model=answers.OwnUsage, responses=errors(*EACH))
async def usage(request: Request) -> Response:
    """What this key has used, by day (UTC) and model. Without keys nothing is counted."""
    lines = await endpoint(request).gate.used(request.state.tenant)
    told = [{**asdict(line), "cost": plain(line.cost)} for line in lines]
    for line in told:
        del line["key"]  # its name is the key's own
    return JSONResponse({"object": "list", "data": told})


@router.get("/v1/load", response_model=answers.LoadFigures, responses=errors(*EACH))
async def load(request: Request) -> Response:
    """How busy the server is; with keys, for those with the operator scope."""
    return JSONResponse(operated(request).worker.load.model_dump())


@router.get(
    "/metrics",
    response_class=Response,  # of no type: that of a class would be said of its errors, too
    responses={200: {"description": "For Prometheus.", "content": {"text/plain": {}}}, **errors(*EACH)},
)
async def prometheus(request: Request) -> Response:
    """Figures under vLLM's names; with keys, for those with the operator scope."""
    at = operated(request)
    load = at.worker.load
    gauges = {
        "num_requests_running": load.running,
        "num_requests_waiting": load.waiting,
        "kv_cache_usage_perc": load.blocks_in_use / load.blocks,
    }
    return Response(at.metrics.text(at.cfg.name, gauges), media_type=metrics.CONTENT_TYPE)


@router.get("/health", response_model=answers.Status, responses=errors(*ALL))
async def health(request: Request) -> Response:
    """Whether the process works: else it has to be restarted."""
    if endpoint(request).worker.broken is not None:
        raise overloaded("the engine has stopped after an error; restart the server")
    return JSONResponse({"status": "ok"})


@router.get("/ready", response_model=answers.Status, responses=errors(*ALL))
async def ready(request: Request) -> Response:
    """Whether requests should come here now."""
    at = endpoint(request)
    if at.is_draining or at.worker.broken is not None:
        raise overloaded("the server is shutting down", retry_after_s=5)
    if at.gate.problem is not None:
        raise overloaded(at.gate.problem, retry_after_s=5)
    return JSONResponse({"status": "ok"})


async def read(request: Request, kind: type[B]) -> B:
    """The body, within its limits, for a model that is served."""
    at = endpoint(request)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" or "content-encoding" in request.headers:
        # Also what keeps a web page of another origin from asking in a visitor's name.
        raise ApiError(415, "the body must be sent as content-type: application/json, without a content-encoding")
    too_large = ApiError(413, f"the body is larger than {config.MAX_BODY_BYTES} bytes", code="body_too_large")
    if int(request.headers.get("content-length", 0)) > config.MAX_BODY_BYTES:  # the protocol only lets digits through
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(config.BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > config.MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {config.BODY_S:g} s", code="timeout", headers={"connection": "close"}
        ) from None
    request.state.num_bytes = len(body)
    parsed = await beside(request, parse, kind, bytes(body))
    known(cast(Sampled | TokenizeBody | DetokenizeBody, parsed).model, at)
    return parsed


async def beside(request: Request, function: Any, *arguments: Any) -> Any:
    """Called in another thread where the body is large. There are few: each keeps the memory of its largest body."""
    if request.state.num_bytes <= INLINE_BYTES:
        return function(*arguments)
    return await asyncio.get_running_loop().run_in_executor(endpoint(request).reader, function, *arguments)


def operated(request: Request) -> Endpoint:
    """The endpoint, for a route that tells of all keys together."""
    at = endpoint(request)
    if not at.gate.is_operator(request.state.tenant):
        raise ApiError(
            403,
            "this key may not read the figures of all keys: they need one of the operator scope "
            "(`gristmill keys create NAME --scope operator`); GET /v1/usage has this key's own usage",
            code="operator_scope_required",
        )
    return at


def asker(request: Request) -> tuple[str, int | None]:
    """Return the tenant and the most tokens that it may ask for."""
    tenant = request.state.tenant
    return tenant, endpoint(request).gate.most_tokens(tenant)


def known(name: str, at: Endpoint) -> None:
    if name != at.cfg.name:
        raise ApiError(
            404,
            f"there is no model {name!r:.80}; this server has {at.cfg.name!r}",
            param="model",
            code="model_not_found",
        )


def model_card(request: Request) -> dict[str, Any]:
    at = endpoint(request)
    return {
        "id": at.cfg.name,
        "object": "model",
        "created": at.created,
        "owned_by": "gristmill",
        "max_model_len": at.served.context,
        "chat": at.served.no_chat is None,
        "experts": at.served.experts,
        "operator": at.gate.is_operator(request.state.tenant),
    }


async def ask(request: Request, body: Sampled, asked: Sequence[EngineRequest], shape: Shape) -> Response:
    """Have a request admitted by the gate and accepted by the engine, and return its answer."""
    at = endpoint(request)
    prompt_tokens = sum(len(one.prompt) for one in asked)
    max_tokens = sum((one.max_tokens or 0) * one.n for one in asked)
    admission = await at.gate.admit(request.state.tenant, at.cfg.name, prompt_tokens, max_tokens)
    deadline = asyncio.get_running_loop().time() + at.cfg.request_s
    try:
        async with asyncio.timeout_at(deadline):
            feed = await while_connected(request.receive, at.worker.submit(asked))
    except BaseException as problem:
        admission.release()
        if isinstance(problem, TimeoutError):
            raise overloaded(f"no room came within {at.cfg.request_s:g} s") from None
        raise
    return Answer(body, shape, feed, admission, deadline, at.cfg.request_s)


async def compiled(grammar: Grammar, at: Endpoint) -> None:
    """Compile a grammar before the engine needs it, one at a time, in a thread: the engine never waits for it."""
    assert at.served.engine.grammars is not None
    try:
        await asyncio.get_running_loop().run_in_executor(at.compiler, at.served.engine.grammars.compile, grammar)
    except InputError as problem:
        raise ApiError(400, str(problem), param="response_format") from None


def api_error(problem: Exception, path: str) -> ApiError:
    """Return the error that a client gets for an exception of a route."""
    match problem:
        case SettingError(setting=setting, code=code):
            names = PARAMS | ({"prompt": "messages"} if path == "/v1/chat/completions" else {})
            return ApiError(400, str(problem), param=names.get(setting, setting), code=code)
        case ApiError():
            return problem
        case InputError():
            return ApiError(400, str(problem))
        case Failure():
            return overloaded(str(problem))
    raise problem


def now() -> int:
    return int(time.time())
