"""Sends the answers of one request, as one body or as server-sent events, while someone is there to read them."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gristmill.errors import Failure
from gristmill.inference import Piece
from gristmill.serve.answers import Json, Shape, usage
from gristmill.serve.errors import ApiError
from gristmill.serve.gate import Admission
from gristmill.serve.worker import Feed

DONE = b"data: [DONE]\n\n"
SETTLE_S = 1.0  # after the time limit, for the engine and the database to let go of a request


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is known of a request that was accepted.

    num_echoed: tokens of the prompt that come before each answer's own. tells_usage: in a last chunk of a stream;
    tells_usage_so_far: in each chunk. deadline: on the event loop's clock; limit_s: the time limit behind it.
    """

    feed: Feed
    shape: Shape
    admission: Admission
    n: int
    num_answers: int
    num_echoed: Sequence[int]
    prompt_tokens: int
    is_stream: bool
    tells_usage: bool
    tells_usage_so_far: bool
    deadline: float
    limit_s: float


class Answer(Response):
    """When the client goes away the request is cancelled. However it ends, its admission is finished, once.

    The last byte of an answer waits until its usage is on the disk, but not beyond the time limit: then the client gets
    an error in its place, and the usage is written as soon as it can be.
    """

    def __init__(self, asked: Asked, headers: Mapping[str, str]) -> None:
        self.asked, self.status_code, self.background = asked, 200, None
        self.media_type = "text/event-stream" if asked.is_stream else "application/json"
        self._extra = headers
        self._is_started = False
        self._finished: asyncio.Future[None] | None = None
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(gone(receive))
        sent = asyncio.ensure_future(self._send(scope, receive, send))
        try:
            await asyncio.wait({left, sent}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            sent.cancel()
            await asyncio.gather(left, sent, return_exceptions=True)
            await self._let_go()
        if sent.done() and not sent.cancelled() and (problem := sent.exception()) is not None:
            raise problem

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self.asked.deadline):
                await (self._stream(send) if self.asked.is_stream else self._whole(scope, receive, send))
        except TimeoutError:
            limit = f"the answer was not complete after {self.asked.limit_s:g} s; ask for fewer tokens"
            if self._finished is not None:
                limit = f"the usage of the answer was not recorded within {self.asked.limit_s:g} s; try again later"
            # Or OpenAI's client would ask for the same again.
            error = ApiError(504, limit, code="timeout", headers={"x-should-retry": "false"})
            await self._fail(error, scope, receive, send)
        except ApiError as error:
            await self._fail(error, scope, receive, send)
        except Failure as failure:
            await self._fail(ApiError(503, str(failure), code="stopped"), scope, receive, send)

    async def _stream(self, send: Send) -> None:
        asked, shape = self.asked, self.asked.shape
        await send({"type": "http.response.start", "status": 200, "headers": self._raw()})
        self._is_started = True
        left, sent = asked.num_answers, [-length for length in asked.num_echoed]
        while left:
            body = b""
            for number, piece in await asked.feed.take():
                _check(piece)
                left -= piece.finish is not None
                index = number * asked.n + piece.choice
                sent[index] += len(piece.tokens)
                so_far = self._usage(sum(max(0, count) for count in sent)) if asked.tells_usage_so_far else None
                for choice in shape.deltas(index, piece):
                    body += _event(shape.chunk([choice], so_far, asked.tells_usage or asked.tells_usage_so_far))
            if not left:
                await self._finish()
                if asked.tells_usage:
                    body += _event(shape.chunk([], self._usage(asked.feed.num_made), True))
                body += DONE
            await send({"type": "http.response.body", "body": body, "more_body": bool(left)})

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked, shape = self.asked, self.asked.shape
        pieces: list[list[Piece]] = [[] for _ in range(asked.num_answers)]
        left = asked.num_answers
        while left:
            for number, piece in await asked.feed.take():
                _check(piece)
                left -= piece.finish is not None
                pieces[number * asked.n + piece.choice].append(piece)
        await self._finish()
        choices = [shape.choice(index, its) for index, its in enumerate(pieces)]
        body = shape.whole(choices, self._usage(asked.feed.num_made))
        self._is_started = True
        await JSONResponse(body, headers=dict(self._extra))(scope, receive, send)

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        await self._let_go()
        if self._is_started:
            await send({"type": "http.response.body", "body": _event(error.body()), "more_body": False})
        else:
            error.headers = {**self._extra, **error.headers}
            await error.response()(scope, receive, send)

    async def _finish(self) -> None:
        """Once begun it runs to its end, whoever gives up waiting for it."""
        await asyncio.shield(self._settling())

    async def _let_go(self) -> None:
        """The same, but when the time is up, only for SETTLE_S, and not at all where that was tried before."""
        left_s = self.asked.deadline - asyncio.get_running_loop().time()
        least_s = SETTLE_S if self._finished is None else 0
        await asyncio.wait({self._settling()}, timeout=max(least_s, left_s))

    def _settling(self) -> "asyncio.Future[None]":
        if self._finished is None:
            self._finished = asyncio.ensure_future(self._settle())
            self._finished.add_done_callback(lambda done: done.cancelled() or done.exception())  # one may not ask
        return self._finished

    async def _settle(self) -> None:
        await self.asked.feed.end()
        await self.asked.admission.finish(self.asked.prompt_tokens, self.asked.feed.num_made)

    def _usage(self, num_made: int) -> Json:
        return usage(self.asked.prompt_tokens, self.asked.feed.cached_tokens, num_made)

    def _raw(self) -> Sequence[tuple[bytes, bytes]]:
        told = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in {**told, **self._extra}.items()]


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


async def gone(receive: Receive) -> None:
    """Returns when the client is."""
    while (await receive())["type"] != "http.disconnect":
        pass
