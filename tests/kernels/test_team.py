"""The threads of the native kernels' own: every piece of a loop is computed once, whatever the threads are doing.

Each claim compares with the same kernel on one thread, bit for bit.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from gristmill.kernels import native
from gristmill.kernels.norm import rms_norm
from gristmill.kernels.packed import experts, pack, pack_experts, product

pytestmark = pytest.mark.usefixtures("built")


@pytest.fixture
def busy() -> Iterator[None]:
    """Two processes that take the CPUs from the kernels' threads in the middle of their work."""
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2)]
    yield
    for other in others:
        other.kill()
        other.wait()


def computed(threads: int, seed: int) -> list[Tensor]:
    """Loops of few and many pieces, one after the other without a pause."""
    generator = torch.Generator().manual_seed(seed)
    T = 1 + seed % 40
    x_TD, weight = torch.randn(T, 96, generator=generator), torch.randn(96, generator=generator)
    matrix = pack(torch.randn(64 + 32 * (seed % 5), 96, generator=generator))
    w1, v1, w2 = (torch.randn(4, 64, 96, generator=generator) for _ in range(3))
    weights_TK, ids_TK = torch.randn(T, 4, generator=generator).softmax(-1).topk(2)
    with native.team(threads), torch.no_grad():
        return [
            rms_norm(x_TD, weight, 1e-5),
            product(x_TD, matrix),
            experts(x_TD, weights_TK, ids_TK, pack_experts(w1, v1, w2)),
        ]


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_loops_of_the_team_equal_one_thread_bit_for_bit_next_to_busy_processes(busy: None, threads: int) -> None:
    for seed in range(300):
        for alone, shared in zip(computed(1, seed), computed(threads, seed), strict=True):
            assert torch.equal(alone, shared), seed


def test_loops_of_a_process_that_yields_its_cores_are_the_same_bit_for_bit(busy: None) -> None:
    torch.set_num_threads(2)
    wanted = {seed: computed(0, seed) for seed in range(100)}
    try:
        for seed, before in wanted.items():
            native.yield_cores(seed % 3 > 0)
            assert all(torch.equal(a, b) for a, b in zip(before, computed(0, seed), strict=True)), seed
    finally:
        native.yield_cores(False)


def test_threads_that_call_at_the_same_time_get_their_own_results() -> None:
    wanted = {seed: computed(1, seed) for seed in range(64)}
    with ThreadPoolExecutor(4) as pool:
        for seed, results in zip(wanted, pool.map(lambda seed: computed(2, seed), wanted), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(wanted[seed], results, strict=True))


def test_a_forked_process_has_a_team_of_its_own() -> None:
    before = computed(2, 7)
    if (child := os.fork()) == 0:
        os._exit(0 if all(torch.equal(a, b) for a, b in zip(before, computed(2, 7), strict=True)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, computed(2, 7), strict=True))


def test_the_team_belongs_to_the_thread_that_asked_for_it() -> None:
    """Others keep OpenMP's threads: nothing that they compute waits for the team."""
    library = native._library()
    assert library is not None
    seen: list[int] = []

    def look() -> None:
        seen.append(library.set_team(0))

    with native.team(2):
        other = threading.Thread(target=look)
        other.start()
        other.join()
        assert library.set_team(2) == 2
    assert seen == [0]
    assert library.set_team(0) == 0


def test_a_team_changes_the_number_of_torchs_threads_in_its_own_thread_only() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as running, ThreadPoolExecutor(1) as new:
            assert running.submit(torch.get_num_threads).result() == 3
            with native.team(2):
                assert torch.get_num_threads() == 1
                assert running.submit(torch.get_num_threads).result() == 3
                assert new.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def mkl_threads() -> str:
    """The calling thread's number of MKL threads, in PyTorch's own words."""
    return next(line for line in torch.__config__.parallel_info().splitlines() if "mkl_get_max_threads" in line)


@pytest.mark.skipif("mkl_get_max_threads" not in torch.__config__.parallel_info(), reason="PyTorch has no MKL here")
def test_mkl_runs_on_one_thread_within_a_team_and_as_before_elsewhere() -> None:
    before = mkl_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as other:
            with native.team(2):
                assert mkl_threads().endswith(": 1")
                assert other.submit(mkl_threads).result().endswith(": 3")
            assert mkl_threads().endswith(": 3")
    finally:
        torch.set_num_threads(int(before.rpartition(" ")[2]))
