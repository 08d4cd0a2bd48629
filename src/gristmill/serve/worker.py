"""Runs the engine in a thread of its own, and passes its answers to the event loop.

Requests come through a queue; after each step all new pieces go to the event loop in one call. The engine waits for no
client: each has a bounded backlog, and its requests are cancelled when that is full.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from gristmill.errors import Failure, InputError
from gristmill.inference import Engine, Piece, QueueFull, Request, Stream
from gristmill.serve import config
from gristmill.serve.answers import LoadFigures
from gristmill.serve.fair import FairQueue
from gristmill.serve.metrics import Metrics

RATE_S = 5.0  # over which tokens per second are counted
STOPPED = "the engine has stopped after an error; restart the server"


class Feed:
    """One client's requests on their way, and the pieces of their answers, by the number of the request.

    `take`, `end`, `put` and `fail` are for the event loop. The rest is for the engine's thread: `streams`, empty until
    the engine has the requests, and `last`, the time of each answer's newest piece, by request and choice.
    """

    def __init__(self, worker: "Worker", requests: Sequence[Request], accepted: "asyncio.Future[None]") -> None:
        self.requests, self.accepted = requests, accepted  # accepted: when the engine has them
        self.arrived = time.monotonic()
        self.num_prompt = sum(len(request.prompt) for request in requests)
        self.num_made = 0  # tokens, also a stop id and those of a stop string, which are not given away
        self.cached_tokens = 0  # of the prompts, found in the cache when the engine got them
        self.streams: list[Stream] = []
        self.last: dict[tuple[int, int], float] = {}
        self._worker = worker
        self._open = len(requests)
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._wake = asyncio.Event()
        self._error: Exception | None = None

    @property
    def tenant(self) -> str:
        return self.requests[0].tenant

    @property
    def cost(self) -> int:
        """The tokens that it can need at most."""
        return self.num_prompt + sum((request.max_tokens or 0) * request.n for request in self.requests)

    def collect(self) -> tuple[list[tuple[int, Piece]], int]:
        """Return the new pieces of the streams, and how many requests are complete with them."""
        pieces, ended = [], 0
        for number, stream in enumerate(self.streams):
            if taken := stream.take():
                pieces += [(number, piece) for piece in taken]
                ended += stream.is_done
        return pieces, ended

    async def take(self) -> list[tuple[int, Piece]]:
        """Return the pieces since the last call, at least one; none when the answers are complete. Raises Failure when
        the requests were cancelled."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            await self._more()
        taken = list(self._pieces)
        self._pieces.clear()
        return taken

    async def end(self) -> None:
        """Cancel what is not complete. Returns when the engine has nothing of it left; then `num_made` is final."""
        self.fail(Failure("cancelled"))
        if self._open:
            self._worker.cancel(self)
        while self._open and self._worker.broken is None:
            await self._more()

    async def _more(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    def put(self, pieces: Sequence[tuple[int, Piece]], ended: int) -> None:
        """ended: how many of the requests are complete with these."""
        self._open -= ended
        if self._error is None:
            self._pieces += pieces
            if len(self._pieces) > self._worker.max_backlog:
                self.fail(Failure(f"more than {self._worker.max_backlog} pieces waited to be read"))
                self._worker.cancel(self)
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Discard the pieces and raise the error in `take`."""
        self._pieces.clear()
        self._error = self._error or error
        self._wake.set()


class Worker:
    """`submit`, `cancel_all`, `load` and `stop` are for the event loop; all else is the thread's."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics, self.max_backlog = engine, metrics, config.MAX_BACKLOG
        self.broken: BaseException | None = None  # what ended the thread: a bug, or too little memory
        self.on_broken: Callable[[], None] = lambda: None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._line: FairQueue[Feed] = FairQueue(engine.cfg.max_waiting)
        self._feeds: dict[Feed, None] = {}  # in the line, and in the engine those with streams
        self._made: deque[tuple[float, int]] = deque()  # when, and how many tokens
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """From within the event loop that will get the pieces."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Feed:
        """All or none; returns when the engine has taken them. Raises InputError, QueueFull, and Failure when the
        engine is broken."""
        feed = Feed(self, requests, self._loop.create_future())
        self._commands.put(lambda: self._submit(feed))
        if self.broken is not None:
            raise Failure(STOPPED)
        try:
            await feed.accepted
        except asyncio.CancelledError:
            self.cancel(feed)
            raise
        return feed

    def cancel(self, feed: Feed) -> None:
        self._commands.put(lambda: self._cancel(feed))

    def cancel_all(self) -> None:
        self._commands.put(self._cancel_all)

    @property
    def load(self) -> LoadFigures:
        scheduler, since = self.engine.scheduler, time.monotonic() - RATE_S
        return LoadFigures(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._line),
            blocks=scheduler.blocks.num_blocks,
            blocks_in_use=scheduler.blocks.num_blocks - scheduler.blocks.available,
            tokens_per_s=sum(count for when, count in list(self._made) if when >= since) / RATE_S,
            prompt_tokens=self.metrics.prompt_tokens,
            cached_tokens=self.metrics.cached_tokens,
            generation_tokens=self.metrics.made_tokens,
        )

    async def stop(self) -> None:
        """Cancels what runs, and ends the thread after its step."""
        self.cancel_all()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while self._obey():
                self._admit()
                if self.engine.step():
                    self._deliver()
        except BaseException as problem:  # whatever it is, who waits must hear of it
            logging.getLogger(__name__).exception("the engine has stopped")
            self.broken = problem
            self._call(self._broken)

    def _obey(self) -> bool:
        """Run the waiting commands; wait for one when there is no other work. Returns False at the end."""
        wait = self.engine.scheduler.is_idle and not self._line
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _submit(self, feed: Feed) -> None:
        if self.broken is not None:
            _settle(feed.accepted, Failure(STOPPED))
            return
        self._feeds[feed] = None
        if (displaced := self._line.push(feed.tenant, feed, feed.cost)) is not None:
            del self._feeds[displaced]
            full = QueueFull(f"{len(self._line)} requests wait already, and none has more of them; try again later")
            self._call(_settle, displaced.accepted, full)

    def _admit(self) -> None:
        """Give the engine the requests that its next step can begin, in the order of the line; none while some still
        wait in the engine, because they would precede other keys' requests."""
        if self.engine.scheduler.waiting:
            return
        while self.engine.scheduler.has_room and (turn := self._line.pop()) is not None:
            self._begin(turn.item)

    def _begin(self, feed: Feed) -> None:
        try:
            for request in feed.requests:
                stream = self.engine.submit(request)
                feed.cached_tokens += self.engine.scheduler.cached_tokens(stream.choices[0].job)
                feed.streams.append(stream)
        except (InputError, QueueFull) as refusal:
            for stream in feed.streams:
                self.engine.cancel(stream)
            self._line.credit(feed.tenant, feed.cost)
            del self._feeds[feed]
            self._call(_settle, feed.accepted, refusal)
            return
        self.metrics.prompt_tokens += feed.num_prompt
        self.metrics.cached_tokens += feed.cached_tokens
        self._call(_settle, feed.accepted, None)

    def _cancel(self, feed: Feed) -> None:
        if self.broken is not None or feed not in self._feeds:
            return
        if self._line.remove(feed.tenant, feed):
            del self._feeds[feed]
            self._call(_settle, feed.accepted, Failure("the server is shutting down"))
        for stream in feed.streams:
            self.engine.cancel(stream)
        self._deliver()

    def _cancel_all(self) -> None:
        for feed in list(self._feeds):
            self._cancel(feed)

    def _deliver(self) -> None:
        """Give everything that is new to the event loop, in one call."""
        now, batch, new = time.monotonic(), [], 0
        for feed in list(self._feeds):
            pieces, ended = feed.collect()
            if pieces:
                self._time(feed, pieces, now)
                num_made = sum(choice.job.num_made for stream in feed.streams for choice in stream.choices)
                new += num_made - feed.num_made
                feed.num_made = num_made
                batch.append((feed, pieces, ended))
                if all(stream.is_done for stream in feed.streams):
                    del self._feeds[feed]
                    self._line.credit(feed.tenant, feed.cost - feed.num_prompt - num_made)
        self.metrics.made_tokens += new
        self._made.append((now, new))
        while self._made[0][0] < now - RATE_S:
            self._made.popleft()
        if batch:
            self._call(_put, batch)

    def _time(self, feed: Feed, pieces: Sequence[tuple[int, Piece]], now: float) -> None:
        for number, piece in pieces:
            answer = number, piece.choice
            if piece.tokens or piece.text:
                if answer in feed.last:
                    self.metrics.between_tokens.add(now - feed.last[answer])
                else:
                    self.metrics.first_token.add(now - feed.arrived)
                feed.last[answer] = now
            if piece.finish is not None:
                self.metrics.finishes[piece.finish] += 1
                self.metrics.whole_request.add(now - feed.arrived)

    def _broken(self) -> None:
        """On the event loop: wake every waiter with the error."""
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command()
        for feed in self._feeds:
            _settle(feed.accepted, Failure(STOPPED))
            feed.fail(Failure(STOPPED))
        self.on_broken()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is there to hear it
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(accepted: "asyncio.Future[None]", refusal: Exception | None) -> None:
    if accepted.done():
        return  # who asked is gone
    if refusal is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(refusal)


def _put(batch: Sequence[tuple[Feed, Sequence[tuple[int, Piece]], int]]) -> None:
    for feed, pieces, ended in batch:
        feed.put(pieces, ended)
