"""The process: one event loop for the clients, one thread for the engine; it ends in good order when it is told to."""

import asyncio
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from h11 import DONE, MUST_CLOSE, ConnectionClosed, Data, EndOfMessage, InformationalResponse
from h11 import Response as RawResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from gristmill.errors import InputError
from gristmill.serve import config
from gristmill.serve.config import ServeConfig
from gristmill.serve.errors import ApiError
from gristmill.serve.routes import Endpoint


class Server(uvicorn.Server):
    """listening: called once with the port. Signals end it in good order, and are not raised again afterwards."""

    def __init__(self, app: FastAPI, cfg: ServeConfig, listening: Callable[[int], None]) -> None:
        self.cfg, self.signum, self._listening = cfg, 0, listening
        self.at: Endpoint = app.state.endpoint
        super().__init__(
            uvicorn.Config(
                app,
                host=cfg.host,
                port=cfg.port,
                http=Patient,
                ws="none",
                lifespan="on",
                log_level="error",  # of our mistakes: what clients do and say is not written down
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=config.MAX_HEADER_BYTES,
                timeout_graceful_shutdown=int(cfg.drain_s) + 5,  # after ours
            )
        )

    async def startup(self, sockets: Any = None) -> None:
        self.at.worker.on_broken = self._end
        try:
            await super().startup(sockets)
        except SystemExit:  # uvicorn's way to say it, after it has logged why
            raise InputError(
                f"cannot listen on {self.cfg.host} port {self.cfg.port}; choose another --port or --host"
            ) from None
        self._listening(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: Any = None) -> None:
        """What runs gets `drain_s`, and what is cut off then is told so."""
        self.at.is_draining = True
        cut = asyncio.get_running_loop().call_later(self.cfg.drain_s, self.at.worker.cancel_all)
        await super().shutdown(sockets)
        cut.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.signum = self.signum or sig
        super().handle_exit(sig, frame)

    def _end(self) -> None:
        self.should_exit = True


class Patient(H11Protocol):
    """uvicorn's protocol, with bounds for a request that does not arrive and for an answer that is not read.

    A client that has sent its request may close its sending side and still wait for the answer (RFC 9112, 9.6), and TCP
    does not tell it from a client that is gone. So the answer is sent. Until it begins, a client of HTTP/1.1 is sent
    `100 Continue` from time to time, which it has to skip; one that is gone replies with a reset.
    """

    _is_half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._timers: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(transport)
        self._start("header", config.HEADER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to keep the connection, for the answer to a request that came in full."""
        if self._is_between or self.conn.their_state not in (DONE, MUST_CLOSE):
            return False
        self._is_half_closed = True
        self._start("probe", config.HALF_CLOSED_S, self._probe)
        return True

    def _probe(self) -> None:
        self._stop("probe")
        if self.transport.is_closing():
            return
        if not self._is_between and not self.cycle.response_started and self.conn.their_http_version == b"1.1":
            event = InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(event))
        self._start("probe", config.HALF_CLOSED_S / 2, self._probe)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_half_closed and self._is_between and not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._is_between:
            self._start("header", config.HEADER_S, self.transport.abort)
        super().data_received(data)
        if not self._is_between:
            self._stop("header")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("reader", config.STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("reader")

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, "this is not an HTTP request, or its header is too large").body()).encode()
        headers = [
            ("content-type", "application/json"),
            ("connection", "close"),
            ("content-length", str(len(body))),
        ]
        response = RawResponse(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, Data(data=body), EndOfMessage(), ConnectionClosed()):
            if output := self.conn.send(event):
                self.transport.write(output)
        self.transport.close()

    @property
    def _is_between(self) -> bool:
        """Whether the client is to send a request's header."""
        return self.cycle is None or self.cycle.response_complete

    def _start(self, name: str, delay_s: float, act: Callable[[], object]) -> None:
        """Start a timer unless it runs already."""
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(delay_s, act)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
