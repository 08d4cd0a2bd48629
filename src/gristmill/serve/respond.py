"""Sends the answers of one request, as one body or as server-sent events, while its client is connected."""

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gristmill.errors import Failure
from gristmill.inference import Piece
from gristmill.serve.answers import Json, Shape, usage
from gristmill.serve.errors import ApiError
from gristmill.serve.gate import Admission
from gristmill.serve.schema import Sampled
from gristmill.serve.worker import Feed

T = TypeVar("T")
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
DONE = b"data: [DONE]\n\n"
SETTLE_S = 1.0  # after the time limit, for the engine and the database to let go of a request


class Answer(Response):
    """The answers of an accepted request. When the client leaves, the request is cancelled. However it ends, its
    admission is finished, once.

    The last byte of an answer waits until its usage is on the disk, but not beyond the time limit: then the client gets
    an error in its place, and the usage is written as soon as it can be. deadline: on the event loop's clock; limit_s:
    the time limit behind it.
    """

    def __init__(
        self, body: Sampled, shape: Shape, feed: Feed, admission: Admission, deadline: float, limit_s: float
    ) -> None:
        self.shape, self.feed, self.admission, self.deadline, self.limit_s = shape, feed, admission, deadline, limit_s
        self.n, self.num_answers = feed.requests[0].n, sum(one.n for one in feed.requests)
        self.is_stream, options = bool(body.stream), body.stream_options
        self.tells_usage = options is not None and bool(options.include_usage)
        self.tells_usage_so_far = options is not None and bool(options.continuous_usage_stats)
        self.status_code, self.background = 200, None
        self.media_type = "text/event-stream" if self.is_stream else "application/json"
        self._is_started = False
        self._finished: asyncio.Future[None] | None = None
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await while_connected(receive, self._send(scope, receive, send))
        finally:
            await self._let_go()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self.deadline):
                await (self._stream(send) if self.is_stream else self._whole(scope, receive, send))
        except TimeoutError:
            limit = f"the answer was not complete after {self.limit_s:g} s; ask for fewer tokens"
            if self._finished is not None:
                limit = f"the usage of the answer was not recorded within {self.limit_s:g} s; try again later"
            # Or OpenAI's client would ask for the same again.
            error = ApiError(504, limit, code="timeout", headers={"x-should-retry": "false"})
            await self._fail(error, scope, receive, send)
        except ApiError as error:
            await self._fail(error, scope, receive, send)
        except Failure as failure:
            await self._fail(ApiError(503, str(failure), code="stopped"), scope, receive, send)

    async def _stream(self, send: Send) -> None:
        shape = self.shape
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.admission.headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS, *headers]})
        self._is_started = True
        echoed = [len(one.prompt) if one.echo else 0 for one in self.feed.requests for _ in range(one.n)]
        left, sent = self.num_answers, [-length for length in echoed]
        while left:
            body = b""
            for number, piece in await self.feed.take():
                _check(piece)
                left -= piece.finish is not None
                index = number * self.n + piece.choice
                sent[index] += len(piece.tokens)
                so_far = self._usage(sum(max(0, count) for count in sent)) if self.tells_usage_so_far else None
                for choice in shape.deltas(index, piece):
                    body += _event(shape.chunk([choice], so_far, self.tells_usage or self.tells_usage_so_far))
            if not left:
                await self._finish()
                if self.tells_usage:
                    body += _event(shape.chunk([], self._usage(self.feed.num_made), True))
                body += DONE
            await send({"type": "http.response.body", "body": body, "more_body": bool(left)})

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        shape = self.shape
        pieces: list[list[Piece]] = [[] for _ in range(self.num_answers)]
        left = self.num_answers
        while left:
            for number, piece in await self.feed.take():
                _check(piece)
                left -= piece.finish is not None
                pieces[number * self.n + piece.choice].append(piece)
        await self._finish()
        choices = [shape.choice(index, its) for index, its in enumerate(pieces)]
        body = shape.whole(choices, self._usage(self.feed.num_made))
        self._is_started = True
        await JSONResponse(body, headers=dict(self.admission.headers))(scope, receive, send)

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        await self._let_go()
        if self._is_started:
            await send({"type": "http.response.body", "body": _event(error.body()), "more_body": False})
        else:
            error.headers = {**self.admission.headers, **error.headers}
            await error.response()(scope, receive, send)

    async def _finish(self) -> None:
        """Once begun it runs to its end, whoever gives up waiting for it."""
        await asyncio.shield(self._settling())

    async def _let_go(self) -> None:
        """The same, but when the time is up, only for SETTLE_S, and not at all where that was tried before."""
        left_s = self.deadline - asyncio.get_running_loop().time()
        least_s = SETTLE_S if self._finished is None else 0
        await asyncio.wait({self._settling()}, timeout=max(least_s, left_s))

    def _settling(self) -> "asyncio.Future[None]":
        if self._finished is None:
            self._finished = asyncio.ensure_future(self._settle())
            self._finished.add_done_callback(lambda done: done.cancelled() or done.exception())  # one may not ask
        return self._finished

    async def _settle(self) -> None:
        await self.feed.end()
        await self.admission.finish(self.feed.num_prompt, self.feed.num_made)

    def _usage(self, num_made: int) -> Json:
        return usage(self.feed.num_prompt, self.feed.cached_tokens, num_made)


def _check(piece: Piece) -> None:
    """Only the server's end cancels an answer that someone still reads."""
    if piece.finish == "error":
        message = "the schema needs more work for one token than is allowed; simplify it"
        raise ApiError(400, message, param="response_format", code="grammar_limit")
    if piece.finish == "cancelled":
        raise ApiError(503, "the server is shutting down", code="shutdown", headers={"retry-after": "5"})


def _event(data: Any) -> bytes:
    """Escaped to ASCII: some clients break lines at U+2028 and the like too."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def while_connected(receive: Receive, awaited: Coroutine[Any, Any, T]) -> T:
    """Await something for a client. Raises ClientDisconnect, and cancels it, when the client leaves first."""
    left, done = asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(awaited)
    try:
        await asyncio.wait({left, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        return done.result()
    finally:
        left.cancel()
        done.cancel()
        await asyncio.gather(left, done, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
