"""Notices that other processes take this training's CPUs, and makes its threads sleep instead of spin.

A thread that spins while it waits resumes at once. Next to a busy process, however, it uses up the time slices of the
very threads that it waits for. benchmarks/neighbors.py has the figures.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from gristmill.kernels import native

PERIOD_S = 0.25  # of computing, after which its CPU time is judged
ENOUGH = 0.8  # of all threads' CPU time: undisturbed, spinning threads get 0.95 and more; next to one busy process 0.6
FIRST_REST, LONGEST_REST = 2, 256  # periods


class Neighbors:
    """Chooses how threads wait by the CPU time that the last period of computing got.

    After a period with too little CPU time, threads sleep for some periods. Then one period with spinning threads is a
    trial. Each trial that gets too little again doubles the number of periods until the next one.

    Args:
        threads: of this process; a single one waits for nobody.
    """

    def __init__(self, threads: int) -> None:
        self.threads, self.rest, self.left = threads, FIRST_REST, 0
        self.wall_s = self.cpu_s = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a step's computing, without saves and without the time in which the caller looks at the model."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu
        if self.threads > 1 and self.wall_s >= PERIOD_S:
            native.yield_cores(self.sleeps_after(self.cpu_s / (self.wall_s * self.threads)))
            self.wall_s = self.cpu_s = 0.0

    def sleeps_after(self, share: float) -> bool:
        """Whether threads sleep in the next period, given the share of their CPU time that the last one got."""
        if self.left:
            self.left -= 1
        elif share < ENOUGH:
            self.left, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)
        else:
            self.rest = FIRST_REST
        return self.left > 0

    def close(self) -> None:
        native.yield_cores(False)
