"""Whose request goes into the engine next: the key's that has been served least. Pure.

The engine serves in the order of arrival, so a thousand requests of one key that are in it stand before another key's
one. Therefore they wait here, in a queue for each key, and the engine is given no more than its next step can begin:

    displaced = queue.push(key, item, cost)                              # a request came
    while engine.scheduler.has_room and (turn := queue.pop()):           # before each step
        engine.submit(...)
    queue.credit(turn.key, unused)                                       # it is complete

Start-time fair queueing (Goyal, Vin and Cheng, 1996), which for tokens is the virtual token counter of Sheng et al.
(OSDI 2024, arXiv:2401.00588). Each key's clock moves on by the cost of what is taken from it, and the key whose clock
is behind goes first; a key that comes back has its clock set to the present, so that nobody saves up turns by being
away. Unlike deficit round robin there is no quantum to choose: over any stretch in which two keys wait all the time,
what is taken from them differs by no more than the largest request of each, added.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gristmill.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Turn(Generic[T]):
    """cost: in tokens, of the prompt and of the most that may be said. It is what can be credited at most."""

    key: str
    item: T
    cost: int


@dataclass(eq=False)
class Lane(Generic[T]):
    """A key's requests in the order of their arrival. clock: tokens."""

    clock: int = 0
    turns: deque[Turn[T]] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """max_waiting: of all keys together."""

    def __init__(self, max_waiting: int) -> None:
        if max_waiting < 1:
            raise InputError(f"max_waiting={max_waiting} must be at least 1")
        self.max_waiting = max_waiting
        self._lanes: dict[str, Lane[T]] = {}  # those that wait, and those whose clock is ahead
        self._now = 0
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def push(self, key: str, item: T, cost: int) -> T | None:
        """When the queue was full, the request that has to go: the last of the key that has most of them, which may be
        this one. So one key cannot fill the queue against another."""
        assert cost > 0  # or a key could have any number of turns at one moment of its clock
        if not self._len:
            self._now = max([self._now, *(lane.clock for lane in self._lanes.values())])
        lane = self._lanes.setdefault(key, Lane())
        if not lane.turns:
            lane.clock = max(lane.clock, self._now)
        lane.turns.append(Turn(key, item, cost))
        self._len += 1
        if self._len <= self.max_waiting:
            return None
        longest = max(self._lanes.values(), key=lambda other: (len(other.turns), other is lane))
        self._len -= 1
        return longest.turns.pop().item

    def pop(self) -> Turn[T] | None:
        """None when nothing waits. Of clocks that show the same, that of the key which came first."""
        waiting = [lane for lane in self._lanes.values() if lane.turns]
        if not waiting:
            return None
        lane = min(waiting, key=lambda lane: lane.clock)
        turn = lane.turns.popleft()
        self._len -= 1
        self._now = max(self._now, lane.clock)
        lane.clock += turn.cost
        self._forget()
        return turn

    def remove(self, key: str, item: T) -> bool:
        """It is not wanted any more. False when it does not wait: it had its turn."""
        if (lane := self._lanes.get(key)) is None:
            return False
        kept = deque(turn for turn in lane.turns if turn.item is not item)
        is_found = len(kept) < len(lane.turns)
        lane.turns, self._len = kept, self._len - is_found
        return is_found

    def credit(self, key: str, tokens: int) -> None:
        """So many of what a turn cost were not used. Once the key has nothing waiting and its clock is not ahead of the
        others', there is nothing to credit: it goes first anyway."""
        if lane := self._lanes.get(key):
            lane.clock -= tokens

    def _forget(self) -> None:
        for key in [k for k, lane in self._lanes.items() if not lane.turns and lane.clock <= self._now]:
            del self._lanes[key]
