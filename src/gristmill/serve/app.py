"""The application: what every request passes before its route, and the schema that is published of all of it."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gristmill.errors import Failure, InputError
from gristmill.serve import config, page
from gristmill.serve.answers import ChatChunk
from gristmill.serve.config import ServeConfig
from gristmill.serve.errors import ApiError, overloaded
from gristmill.serve.gate import Gate
from gristmill.serve.load import Served
from gristmill.serve.metrics import Metrics
from gristmill.serve.routes import Endpoint, api_error, now, router
from gristmill.serve.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gristmill.serve.worker import Worker

WITHOUT_KEY = {"/health", "/ready", *page.FILES}
DISCARDED_BYTES = 256 << 20
OWN_NAMES = {"localhost", "127.0.0.1", "[::1]"}


def build_app(served: Served, cfg: ServeConfig, gate: Gate) -> FastAPI:
    """The engine's thread runs from the application's start to its end."""
    metrics = Metrics()
    worker = Worker(served.engine, metrics)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()
        for executor in (at.compiler, at.reader):
            executor.shutdown(wait=False, cancel_futures=True)
        gate.close()

    # No pages of documentation: they would fetch their scripts from other hosts.
    app = FastAPI(title="Gristmill", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=running)
    at = Endpoint(served=served, cfg=cfg, gate=gate, worker=worker, metrics=metrics, created=now())
    app.state.endpoint = at
    app.include_router(router)
    app.include_router(page.router)
    app.add_middleware(Edge, endpoint=at)
    for known in (ApiError, InputError, Failure):
        app.add_exception_handler(known, lambda request, error: api_error(error, request.url.path).response())
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(ClientDisconnect, lambda _, __: Response(status_code=400))  # nobody reads it
    app.add_exception_handler(
        Exception, lambda _, __: ApiError(500, "the server made a mistake; it is logged").response()
    )
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


class Edge:
    """What comes before the routes: keys, room, a number for each request, HEAD, and bodies that nobody reads.

    HEAD is answered as GET; uvicorn leaves the body out. A body is read to its end, within bounds, before an error is
    sent: a connection that is closed with unread data is reset, and then the client may never see the error.
    """

    def __init__(self, app: ASGIApp, endpoint: Endpoint) -> None:
        self.app, self.at = app, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number = f"req_{uuid.uuid4().hex}".encode()
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        incoming = Incoming(receive)

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", number)]
                if message["status"] >= 400:
                    await self._discard(scope, message["status"], incoming)
                    if not incoming.is_whole:
                        message["headers"].append((b"connection", b"close"))
            await send(message)

        self.at.num_requests += 1
        try:
            await self._check(Request(scope))
        except ApiError as refusal:
            await refusal.response()(scope, incoming.receive, numbered)
        else:
            await self.app(scope, incoming.receive, numbered)
        finally:
            self.at.num_requests -= 1

    async def _check(self, request: Request) -> None:
        at, path = self.at, request.scope["path"]
        if sum(len(name) + len(value) for name, value in request.scope["headers"]) > config.MAX_HEADER_BYTES:
            # The protocol's own limit is for what has not come whole: what comes at once is larger at times.
            raise ApiError(400, f"the header is larger than {config.MAX_HEADER_BYTES} bytes", code="header_too_large")
        if at.gate.is_open and _host(request) not in OWN_NAMES:
            # A page of another site can have its own name point to this machine, and read the answers.
            raise ApiError(
                403, "without keys this server answers to localhost alone; make a key, or ask it by that name"
            )
        request.state.tenant = ""
        if path not in WITHOUT_KEY:
            request.state.tenant = await self._identified(request.headers.get("authorization"))
            if at.is_draining:
                raise overloaded("the server is shutting down", retry_after_s=5)
            if at.num_requests > at.cfg.max_requests:
                raise overloaded(f"{at.cfg.max_requests} requests are worked on already")

    async def _discard(self, scope: Scope, status: int, incoming: "Incoming") -> None:
        """Unless the client waits for leave to send its body, or is too slow with it. Takes no other request's room."""
        waits = any(name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"])
        if status == 408 or (waits and not incoming.is_begun):
            return
        self.at.num_requests -= 1
        try:
            await incoming.discard()
        finally:
            self.at.num_requests += 1

    async def _identified(self, authorization: str | None) -> str:
        try:
            async with asyncio.timeout(self.at.cfg.request_s):
                return await self.at.gate.identify(authorization)
        except TimeoutError:
            raise overloaded("keys cannot be looked up now; try again later", retry_after_s=5) from None


class Incoming:
    """A request's body, of which somebody may have read a part."""

    def __init__(self, receive: Receive) -> None:
        self.is_begun = self.is_whole = False
        self._receive = receive

    async def receive(self) -> Message:
        self.is_begun = True
        message = await self._receive()
        self.is_whole = not message.get("more_body", False)  # also when the client has gone
        return message

    async def discard(self) -> None:
        """Read what is left of it, at most DISCARDED_BYTES and for as long as a body may take."""
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(config.BODY_S):
                while not self.is_whole and num_bytes < DISCARDED_BYTES:
                    num_bytes += len((await self.receive()).get("body", b""))


def _host(request: Request) -> str:
    host = request.headers.get("host", "").lower()
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def _routing(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    path = f"{request.method} {request.scope['path']}"
    match problem.status_code:
        case 404:
            error = ApiError(404, f"there is no {path:.200}; GET /openapi.json lists what there is", code="unknown_url")
        case 405:
            error = ApiError(405, f"{path:.200} is not possible", code="method_not_allowed")
        case _:
            error = ApiError(problem.status_code, str(problem.detail))
    error.headers = dict(problem.headers or {})
    if error.headers.get("Allow") == "GET":
        error.headers = {**error.headers, "Allow": "GET, HEAD"}
    return error.response()


def _schema(app: FastAPI) -> dict[str, Any]:
    """FastAPI's own, and what it cannot see: bodies, which we read ourselves, and keys, which are asked for before."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version="1", routes=app.routes)
        kinds = [(kind, "validation") for kind in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, ChatChunk)]
        _, bodies = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        schema["components"]["schemas"].update(bodies["$defs"])
        for body in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody):
            of_model = schema["components"]["schemas"][body.__name__]["properties"]["model"]
            of_model["enum"] = [app.state.endpoint.cfg.name]
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in schema["paths"].items():
            for said in methods.values():
                said["security"] = [] if path in WITHOUT_KEY else [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema
