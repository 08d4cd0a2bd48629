"""Training's idle threads sleep while its busy threads queue for a CPU."""

import hashlib
import os
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.train.neighbors import Neighbors, Times, thread_times


def judged(looks: list[Times]) -> list[bool]:
    """Whether neighbors are busy at each look but the first, with one second between two looks."""
    times, clock = iter(looks), iter(range(len(looks)))
    neighbors = Neighbors(2, lambda: next(times), lambda: next(clock))
    return [neighbors.are_busy() for _ in looks[1:]]


def test_only_the_time_since_the_last_look_counts() -> None:
    looks = [{7: (5.0, 5.0)}, {7: (6.0, 5.0)}, {7: (6.5, 5.5)}, {7: (7.5, 5.5)}]
    assert judged(looks) == [False, True, False]


def test_one_thread_that_queues_is_enough_and_an_idle_one_does_not_count() -> None:
    begin = dict.fromkeys(range(64), (0.0, 0.0))
    spinning = dict.fromkeys(range(64), (1.0, 0.0))
    assert judged([begin, spinning]) == [False]
    assert judged([begin, spinning | {63: (0.5, 0.5)}]) == [True]
    assert judged([begin, spinning | {63: (0.001, 0.01)}]) == [False]


def test_threads_may_start_and_end_between_two_looks() -> None:
    assert judged([{1: (9.0, 9.0)}, {2: (1.0, 0.0)}, {3: (0.5, 0.5)}, {}]) == [False, True, False]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_without_queueing_threads_spin_and_with_equal_halves_they_sleep(ran: list[float]) -> None:
    begin = dict.fromkeys(range(len(ran)), (0.0, 0.0))
    assert judged([begin, {thread: (seconds, 0.0) for thread, seconds in enumerate(ran)}]) == [False]
    assert judged([begin, {thread: (seconds, seconds) for thread, seconds in enumerate(ran)}]) == [max(ran) > 0.1]


@pytest.mark.skipif(sys.platform != "linux", reason="thread times come from /proc")
def test_two_busy_threads_on_one_cpu_queue_for_it_and_a_sleeping_thread_does_not() -> None:
    """hashlib computes without the interpreter's lock, so the two threads are runnable at the same time."""
    data, ends, ids = bytes(1 << 20), time.monotonic() + 1.0, list[int]()
    cpu = min(os.sched_getaffinity(0))

    def compute() -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        ids.append(threading.get_native_id())
        while time.monotonic() < ends:
            hashlib.sha256(data)

    def wait() -> None:
        ids.append(threading.get_native_id())
        done.wait()

    done = threading.Event()
    busy = [threading.Thread(target=compute) for _ in range(2)]
    asleep = threading.Thread(target=wait)
    for thread in (*busy, asleep):
        thread.start()
    time.sleep(0.1)
    before = thread_times()
    time.sleep(0.7)
    after = thread_times()
    done.set()
    for thread in (*busy, asleep):
        thread.join()
    queued = {id: after[id][1] - before[id][1] for id in ids}
    assert sum(waited > 0.1 for waited in queued.values()) >= 2
    assert min(queued.values()) < 0.05
