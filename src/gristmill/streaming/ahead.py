"""Fetches the shard files that the next steps need, in the background, so that no step waits for the network."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from gristmill.streaming.cache import ShardFiles
from gristmill.streaming.mds import MDSReader

STEPS = 128  # looked ahead: a minute or more of training, in which a slow link brings several shards
WORKERS = 2  # one download's pauses are filled by another's bytes
Need = tuple[int, int]  # source, shard


class Ahead:
    """What is known of the next steps, and the threads that fetch; they end when nothing is left to do.

    needs: (step, rank, world_size) -> the shards that a batch reads. budget_bytes: of the files that are planned for
    at a time, so that what is fetched early does not evict what is needed sooner.
    """

    def __init__(
        self,
        files: Sequence[ShardFiles],
        readers: Sequence[MDSReader],
        needs: Callable[[int, int, int], list[Need]],
        steps: int,
        budget_bytes: int,
    ) -> None:
        self._files, self._readers, self._needs = files, readers, needs
        self._steps, self._budget_bytes = steps, budget_bytes
        self._lock = threading.Lock()  # over _todo and _num_workers, which alone the threads touch
        self._todo: deque[Need] = deque()
        self._num_workers = 0
        self._planned: dict[Need, int] = {}  # -> the last step that is known to need it
        self._view, self._step, self._next = (0, 1), -1, 0  # steps before _next are planned for

    def look(self, step: int, rank: int, world_size: int) -> None:
        """A batch is asked for: fetch what the steps after it need and is not here. Returns at once."""
        if (rank, world_size) != self._view or not self._step <= step <= self._next:
            self._planned.clear()
            self._next = 0
        self._view, self._step, self._next = (rank, world_size), step, max(self._next, step + 1)
        self._planned = {need: last for need, last in self._planned.items() if last > step}
        found = self._plan()
        with self._lock:
            self._todo = deque(need for need in (*self._todo, *found) if need in self._planned)
            missing = min(WORKERS, len(self._todo)) - self._num_workers
            self._num_workers += max(0, missing)
        for _ in range(missing):
            threading.Thread(target=self._work, daemon=True).start()

    def _plan(self) -> list[Need]:
        """Go on planning as far as the budget goes; returns what has to be fetched."""
        left = self._budget_bytes - sum(self._info(need)["bytes"] for need in self._planned)
        found: list[Need] = []
        while self._next < min(self._step + 1 + STEPS, self._steps):
            for need in self._needs(self._next, *self._view):
                if need not in self._planned:
                    left -= self._info(need)["bytes"]
                    if left < 0:
                        return found
                    if not self._files[need[0]].touch(self._info(need)):  # a file that is here is kept for then
                        found.append(need)
                self._planned[need] = self._next
            self._next += 1
        return found

    def _info(self, need: Need) -> dict[str, Any]:
        source, shard = need
        return self._readers[source].stored(shard)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._todo:
                    self._num_workers -= 1
                    return
                need = self._todo.popleft()
            with suppress(Exception):  # the step that needs it will meet the same, try again and say what it was
                self._files[need[0]].fetch_ahead(self._info(need))
