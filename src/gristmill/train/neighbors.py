"""Notices that other processes compete for this training's CPUs, and then lets idle threads sleep instead of spin.

A spinning thread resumes at once. Next to a busy process, however, it uses up the time slices of the threads that it
waits for. benchmarks/neighbors.py has the figures.
"""

import time
from collections.abc import Callable
from pathlib import Path

from gristmill.kernels import native

PERIOD_S = 0.25  # between two looks
CONTENDED = 0.15  # of a thread's runnable time spent in the queue for a CPU; below 0.02 on a quiet machine
MIN_RUNNABLE = 0.2  # of a period; a thread that was runnable for less does not count

Times = dict[int, tuple[float, float]]  # thread id -> seconds on a CPU, seconds in the queue for one


def thread_times() -> Times:
    """How long each thread of this process ran, and how long it was runnable but waited for a CPU.

    Empty where the kernel does not say, as on macOS. Source: Linux, Documentation/scheduler/sched-stats.rst.
    """
    times: Times = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            ran_ns, waited_ns, _slices = (task / "schedstat").read_text().split()
        except (OSError, ValueError):  # the thread has ended
            continue
        times[int(task.name)] = int(ran_ns) / 1e9, int(waited_ns) / 1e9
    return times


class Neighbors:
    """Chooses how this process's idle threads wait, by how long its busy threads queue for a CPU.

    Args:
        threads: that compute; with only one, no thread waits for another and nothing is chosen.
        read: tells the threads' times.
        clock: in seconds.
    """

    def __init__(
        self,
        threads: int,
        read: Callable[[], Times] = thread_times,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.threads, self.read, self.clock = threads, read, clock
        self.time, self.times = clock(), read()

    def look(self) -> None:
        """Judge the time since the last look; call it after each step."""
        if self.threads > 1 and self.clock() - self.time >= PERIOD_S:
            native.yield_cores(self.are_busy())

    def are_busy(self) -> bool:
        """Whether a thread that was busy since the last look spent much of that time in the queue for a CPU."""
        time, times = self.clock(), self.read()
        period, before = time - self.time, self.times
        self.time, self.times = time, times
        for thread, (ran, waited) in times.items():
            ran_before, waited_before = before.get(thread, (0.0, 0.0))
            ran, waited = ran - ran_before, waited - waited_before
            if ran + waited > MIN_RUNNABLE * period and waited > CONTENDED * (ran + waited):
                return True
        return False

    def close(self) -> None:
        native.yield_cores(False)
