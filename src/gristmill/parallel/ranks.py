"""The processes of one training: who they are, how their sums meet, and which of them is missing when they do not.

Each is a rank of torch.distributed, as torchrun starts it. A collective call that does not come back says little about
whose fault it is; so every rank leaves a beat in the common store each second, and whoever is left looks there.
"""

import itertools
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from gristmill.background import Answer
from gristmill.errors import Failure, InputError
from gristmill.stop import Stop, StopRequested

T = TypeVar("T")

BEAT_S = 1.0
MISSED_BEATS = 10  # after so many a rank counts as gone: far above a pause of the scheduler
GLOO_SAYS = ("gloo", "pair closure")  # of a closed connection, or of the timeout
ASK_S = BEAT_S * MISSED_BEATS  # for an answer of the store: a machine that was cut off gets none, and no error either
LEAVE_S = 5.0  # that rank 0 waits for the others to go
TIMEOUT_S = 300.0  # for a rank that computes but does not arrive


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world_size` processes; every method is a call that all of them make, in the same order.

    `turns` numbers the calls of `turn`. A single process does not use it, so that `ALONE` has no state.
    """

    rank: int = 0
    world_size: int = 1
    store: Any = None
    timeout_s: float = TIMEOUT_S
    turns: Iterator[int] = field(default_factory=itertools.count)

    def sum(self, *tensors: Tensor) -> None:
        """Add up each tensor over all ranks, in place; every rank gets the same bits."""
        if self.world_size > 1:
            self._together(lambda: [work.wait() for work in [dist.all_reduce(t, async_op=True) for t in tensors]])

    def from_first(self, number: int) -> int:
        """Rank 0's number, on all ranks."""
        if self.world_size == 1:
            return number
        told = torch.tensor([number if self.rank == 0 else 0], dtype=torch.int64)  # a bool, too
        self.sum(told)
        return int(told)

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        if self.world_size == 1:
            return here
        told = torch.tensor(float(here))
        self.sum(told)
        return bool(told)

    def raise_if_set(self, stop: Stop) -> None:
        """Raises StopRequested on every rank if `stop` is set on any rank."""
        if self.any(stop.is_set()):
            raise StopRequested

    def gather(self, value: T) -> list[T] | None:
        """Every rank's value, on rank 0. Values travel between our own processes only, and are never stored."""
        if self.world_size == 1:
            return [value]
        found: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        self._together(lambda: dist.gather_object(value, found))
        return found

    def scatter(self, values: Sequence[T] | None) -> T:
        """Rank 0's r-th value, on rank r."""
        if self.world_size == 1:
            assert values is not None
            return values[0]
        mine: list[Any] = [None]
        self._together(lambda: dist.scatter_object_list(mine, list(values) if values is not None else None))
        return mine[0]

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Rank 0 gets True and does the work, however long it takes; the others get False once it is done.

        Waiting ends with a Failure when rank 0 has gone.
        """
        if self.world_size == 1:
            yield True
            return
        name = f"turn/{next(self.turns)}"
        if self.rank == 0:
            yield True
            self._ask("set", name, "done")
        else:
            self._wait_for(name)
            yield False

    def leave(self) -> None:
        """The last call, whatever happened. Rank 0, which may keep the store, goes last, unless the others are gone."""
        with suppress(Failure):
            if self.rank > 0:
                self._ask("set", f"left/{self.rank}", "", patience_s=LEAVE_S)
            until = time.monotonic() + LEAVE_S
            others = [f"left/{rank}" for rank in range(1, self.world_size)] if self.rank == 0 else []
            while others and not self._ask("check", others) and time.monotonic() < until:
                time.sleep(BEAT_S / 20)

    def _wait_for(self, key: str) -> None:
        pulse = Pulse(self)
        while not self._ask("check", [key]):
            time.sleep(BEAT_S / 4)
            if pulse.missed([0]):
                raise self._gone([0])

    def _together(self, call: Callable[[], object]) -> None:
        with self.meeting():
            call()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around calls in which ranks wait for each other: says who is gone when that fails."""
        try:
            yield
        except Failure:  # said already
            raise
        except RuntimeError as problem:
            is_gloos = isinstance(problem, dist.DistError) or any(words in str(problem) for words in GLOO_SAYS)
            if self.world_size == 1 or not is_gloos:
                raise
            raise self._explained(problem) from None

    def _explained(self, problem: RuntimeError) -> Failure:
        before = self._beats(range(self.world_size))
        time.sleep(BEAT_S * MISSED_BEATS)
        after = self._beats(range(self.world_size))
        if gone := [rank for rank in before if before[rank] == after[rank] and rank != self.rank]:
            return self._gone(gone)
        return Failure(
            f"rank {self.rank} waited {self.timeout_s:.0f} s for the others, and all of them are alive: one computes "
            f"or reads for longer, or is out of step ({problem}); the same command goes on from the last checkpoint"
        )

    def _gone(self, ranks: Sequence[int]) -> Failure:
        known = [rank for rank in ranks if self._ask("check", [f"who/{rank}"])]
        who = {rank: f" ({self._ask('get', f'who/{rank}').decode()})" for rank in known}
        names = ", ".join(f"rank {rank}{who.get(rank, '')}" for rank in ranks)
        return Failure(
            f"{names} is gone: killed, stopped or cut off; all others end here, and the same command goes on from the "
            "last checkpoint"
        )

    def _beats(self, ranks: Collection[int]) -> dict[int, int]:
        return {rank: self._ask("add", f"beat/{rank}", 0) for rank in ranks}

    def _ask(self, call: Literal["get", "set", "add", "check"], *args: Any, patience_s: float = ASK_S) -> Any:
        """Ask the store; it lives with torchrun's agent, or else with rank 0."""
        try:
            answer, problem = Answer(partial(getattr(self.store, call), *args)).within(patience_s)
        except queue.Empty:
            raise Failure(
                f"rank {self.rank} is cut off: the store that the ranks share did not answer for {patience_s:.0f} s; "
                "look at this machine's network and at rank 0's; the same command goes on from the last checkpoint"
            ) from None
        if isinstance(problem, RuntimeError):
            raise Failure(
                "the store that the ranks share is gone, and with it rank 0 or torchrun; all others end here, and the "
                "same command goes on from the last checkpoint"
            ) from None
        if problem is not None:
            raise problem
        return answer


class Pulse:
    """Watches beats for whoever waits for what no collective call brings. Any thread may have one."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._looked = 0.0
        self._last: dict[int, tuple[int, float]] = {}  # the beat that was seen last, and since when

    def missed(self, watched: Collection[int]) -> list[int]:
        """Those that have left no beat for so long that they are gone; to be asked again and again."""
        now = time.monotonic()
        if now - self._looked > BEAT_S / 2:
            self._looked = now
            for rank, beat in self._ranks._beats(watched).items():
                if rank not in self._last or self._last[rank][0] != beat:
                    self._last[rank] = beat, now
        return [rank for rank in watched if now - self._last[rank][1] > BEAT_S * MISSED_BEATS]


ALONE = Ranks()


def join(timeout_s: float = TIMEOUT_S) -> Ranks:
    """This process's place, from the environment that torchrun sets; alone where it is not set."""
    if _from_torchrun("WORLD_SIZE", 1) == 1:
        return ALONE
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_from_torchrun("LOCAL_RANK", 0))
        backend = "cpu:gloo,cuda:nccl"
    try:
        place, problem = Answer(lambda: next(iter(rendezvous("env://", timeout=timeout)))).within(timeout_s + ASK_S)
        if problem is not None:
            raise problem
        store, rank, world_size = place
        name, problem = Answer(partial(_meet, store, rank, world_size, timeout_s)).within(timeout_s + ASK_S)
        if problem is not None:
            raise problem
        mine: Any = PrefixStore(name, store)
        dist.init_process_group(backend, store=mine, rank=rank, world_size=world_size, timeout=timeout)
    except Failure:
        raise
    except queue.Empty:  # torch tries again beyond its own timeout where nobody listens
        raise Failure(
            f"the processes of this training did not find each other: the store that they share did not answer for "
            f"{timeout_s + ASK_S:.0f} s; look at what rank 0 says, and at the network"
        ) from None
    except (RuntimeError, ValueError) as problem:
        raise Failure(f"the processes of this training did not find each other: {problem}") from None
    mine.set(f"who/{rank}", f"process {os.getpid()} on {os.uname().nodename}")
    beating = threading.Thread(target=_beat, args=(mine.clone(), rank), name="beat", daemon=True)
    beating.start()
    return Ranks(rank, world_size, mine, timeout_s)


def _from_torchrun(name: str, least: int) -> int:
    """The value of one of torchrun's variables; `least`, the value for one process, where it is not set."""
    text = os.environ.get(name) or str(least)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise InputError(
            f"{name}={text!r} must be an integer of at least {least}; torchrun sets it, so start the command "
            "with torchrun, or unset it to use one process"
        )
    return int(text)


def _meet(store: Any, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for this meeting of the ranks, new each time: torchrun keeps one store over its restarts, and what the
    processes before left there, such as their addresses, must not be read.

    Rank 0 proposes one; each rank answers with a word of its own, and goes in when it finds its word among those that
    rank 0 has heard. Raises Failure when the others do not come.
    """
    word, until = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank == 0:
        store.set("meeting", word)
    while time.monotonic() < until:
        name = store.get("meeting").decode()
        store.set(f"{name}/{rank}", word)
        answers = [f"{name}/{other}" for other in range(world_size)]
        if rank == 0 and store.check(answers):
            store.set(f"{name}/heard", " ".join(store.get(answer).decode() for answer in answers))
        if store.check([f"{name}/heard"]) and word in store.get(f"{name}/heard").decode().split():
            return name
        time.sleep(BEAT_S / 20)
    raise Failure(
        f"rank {rank} waited {timeout_s:.0f} s for all {world_size} ranks to start; look at what the others say"
    )


def _beat(store: Any, rank: int) -> None:
    while True:
        try:
            store.add(f"beat/{rank}", 1)
        except RuntimeError:  # the store is gone: the next collective call says so
            return
        time.sleep(BEAT_S)
