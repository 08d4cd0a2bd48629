"""The engine's own thread, and what its answers pass on their way to the event loop.

Requests go in by a queue; after each step all new pieces go out in one call. The engine waits for nobody: who does not
read has a bounded backlog, and is cancelled when it is full.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from gristmill.errors import Failure, InputError
from gristmill.inference import Engine, Piece, QueueFull, Request, Stream
from gristmill.inference.blocks import chained
from gristmill.serve import config
from gristmill.serve.fair import FairQueue, has_room
from gristmill.serve.metrics import Metrics

RATE_S = 5.0  # over which tokens per second are counted
STOPPED = "the engine has stopped after an error; restart the server"


@dataclass(frozen=True, kw_only=True)
class Load:
    """Sequences, blocks of the cache, and tokens made a second, over the last seconds."""

    running: int
    waiting: int
    blocks: int
    blocks_in_use: int
    tokens_per_s: float


class Feed:
    """One client's answers, on the event loop's side: pieces of the requests by their number, as they come."""

    def __init__(self, worker: "Worker", num_requests: int) -> None:
        self.num_made = 0  # tokens, also those that were not given away: a stop id, a stop string's
        self.cached_tokens = 0  # of the prompts, found in the cache when they came
        self._worker = worker
        self._open = num_requests
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._wake = asyncio.Event()
        self._error: Exception | None = None

    async def take(self) -> list[tuple[int, Piece]]:
        """What has come since, at least one piece; nothing when all was taken. Raises Failure when broken off."""
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
        """Nobody reads any more. Returns when nothing of it is left in the engine; `num_made` is the last word then."""
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
        """What has come is not given any more."""
        self._pieces.clear()
        self._error = self._error or error
        self._wake.set()


@dataclass(eq=False)
class Work:
    """A feed on the engine's side. `last`: when a piece of each answer came, by request and choice."""

    feed: Feed
    requests: Sequence[Request]
    accepted: "asyncio.Future[None]"  # when the engine has taken it
    arrived: float
    streams: list[Stream] = field(default_factory=list)
    last: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def tenant(self) -> str:
        return self.requests[0].tenant

    @property
    def num_prompt(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def cost(self) -> int:
        """The tokens that it can need at most."""
        return self.num_prompt + sum((request.max_tokens or 0) * request.n for request in self.requests)

    @property
    def num_made(self) -> int:
        return sum(choice.job.num_made for stream in self.streams for choice in stream.choices)

    def take(self) -> tuple[list[tuple[int, Piece]], int]:
        """New pieces, and how many requests are complete with them."""
        pieces, ended = [], 0
        for number, stream in enumerate(self.streams):
            if taken := stream.take():
                pieces += [(number, piece) for piece in taken]
                ended += stream.is_done
        return pieces, ended


class Worker:
    """`submit`, `cancel_all`, `load` and `stop` are for the event loop; all else is the thread's."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics, self.max_backlog = engine, metrics, config.MAX_BACKLOG
        self.broken: BaseException | None = None  # what ended the thread: a bug, or too little memory
        self.on_broken: Callable[[], None] = lambda: None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._line: FairQueue[Work] = FairQueue(engine.cfg.max_waiting)
        self._in_line: dict[Feed, Work] = {}
        self._work: dict[Feed, Work] = {}  # in the engine
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
        work = Work(Feed(self, len(requests)), requests, self._loop.create_future(), time.monotonic())
        self._commands.put(lambda: self._submit(work))
        if self.broken is not None:
            raise Failure(STOPPED)
        try:
            await work.accepted
        except asyncio.CancelledError:
            self.cancel(work.feed)
            raise
        return work.feed

    def cancel(self, feed: Feed) -> None:
        self._commands.put(lambda: self._cancel(feed))

    def cancel_all(self) -> None:
        self._commands.put(self._cancel_all)

    @property
    def load(self) -> Load:
        scheduler, since = self.engine.scheduler, time.monotonic() - RATE_S
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._line),
            blocks=scheduler.blocks.num_blocks,
            blocks_in_use=scheduler.blocks.num_blocks - scheduler.blocks.available,
            tokens_per_s=sum(count for when, count in list(self._made) if when >= since) / RATE_S,
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
        """Do what is asked for; waits where there is nothing else to do. Whether to go on."""
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

    def _submit(self, work: Work) -> None:
        if self.broken is not None:
            _settle(work.accepted, Failure(STOPPED))
            return
        self._in_line[work.feed] = work
        if (displaced := self._line.push(work.tenant, work, work.cost)) is not None:
            del self._in_line[displaced.feed]
            full = QueueFull(f"{len(self._line)} requests wait already, and none has more of them; try again later")
            self._call(_settle, displaced.accepted, full)

    def _admit(self) -> None:
        """To the engine what its next step can begin, in the order of the line; nothing while some still wait in it,
        which would stand before other keys'."""
        if self.engine.scheduler.waiting:
            return
        while has_room(self.engine.scheduler) and (turn := self._line.pop()) is not None:
            self._begin(turn.item)

    def _begin(self, work: Work) -> None:
        del self._in_line[work.feed]
        try:
            for request in work.requests:
                work.feed.cached_tokens += self._cached_tokens(request)
                work.streams.append(self.engine.submit(request))
        except (InputError, QueueFull) as refusal:
            for stream in work.streams:
                self.engine.cancel(stream)
            self._line.credit(work.tenant, work.cost)
            self._call(_settle, work.accepted, refusal)
            return
        self._work[work.feed] = work
        self.metrics.prompt_tokens += work.num_prompt
        self.metrics.cached_tokens += work.feed.cached_tokens
        self._call(_settle, work.accepted, None)

    def _cancel(self, feed: Feed) -> None:
        if self.broken is not None:
            return
        if (work := self._in_line.pop(feed, None)) is not None:
            self._line.remove(work.tenant, work)
            self._call(_settle, work.accepted, Failure("the server is shutting down"))
        if (work := self._work.get(feed)) is not None:
            for stream in work.streams:
                self.engine.cancel(stream)
            self._deliver()

    def _cancel_all(self) -> None:
        for feed in [*self._in_line, *self._work]:
            self._cancel(feed)

    def _deliver(self) -> None:
        """Everything that is new, to the event loop in one call."""
        now, batch, new = time.monotonic(), [], 0
        for work in list(self._work.values()):
            pieces, ended = work.take()
            if pieces:
                self._time(work, pieces, now)
                num_made = work.num_made
                new += num_made - work.feed.num_made
                work.feed.num_made = num_made
                batch.append((work.feed, pieces, ended))
                if all(stream.is_done for stream in work.streams):
                    del self._work[work.feed]
                    self._line.credit(work.tenant, work.cost - work.num_prompt - num_made)
        self.metrics.made_tokens += new
        self._made.append((now, new))
        while self._made[0][0] < now - RATE_S:
            self._made.popleft()
        if batch:
            self._call(_put, batch)

    def _time(self, work: Work, pieces: Sequence[tuple[int, Piece]], now: float) -> None:
        for number, piece in pieces:
            answer = number, piece.choice
            if piece.tokens or piece.text:
                if answer in work.last:
                    self.metrics.between_tokens.add(now - work.last[answer])
                else:
                    self.metrics.first_token.add(now - work.arrived)
                work.last[answer] = now
            if piece.finish is not None:
                self.metrics.finishes[piece.finish] += 1
                self.metrics.whole_request.add(now - work.arrived)

    def _cached_tokens(self, request: Request) -> int:
        """Of its prompt, those whose keys and values are in the cache now."""
        size = self.engine.cfg.block_tokens
        if not self.engine.cfg.prefix_cache or request.scores_prompt:
            return 0
        names: list[bytes] = []
        for start in range(0, (len(request.prompt) - 1) // size * size, size):
            names.append(chained(names[-1] if names else None, request.prompt[start : start + size], request.tenant))
        return len(self.engine.scheduler.blocks.find(names)) * size

    def _broken(self) -> None:
        """On the event loop: nobody waits in vain."""
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command()
        for work in self._in_line.values():
            _settle(work.accepted, Failure(STOPPED))
        for feed in self._work:
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
