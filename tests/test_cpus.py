"""Usable CPUs are counted by affinity and quota; OpenMP gets as many threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gristmill.cpus import usable_cpus

CPUS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cgroup(root: Path, line: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"5:memory:/elsewhere\n{line}\n")
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("line", "files", "cpus"),
    [
        ("0::/", {"cpu.max": "max 100000"}, CPUS),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "1000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),  # an ancestor's
        ("3:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, CPUS),
        ("3:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "90000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1),
        # In a container, the path is the host's and the mount holds the container's own group.
        ("3:cpu:/host/path", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("0::/", {"cpu.max": "nonsense"}, CPUS),
    ],
)
def test_a_cpu_quota_limits_the_usable_cpus(tmp_path: Path, line: str, files: dict[str, str], cpus: int) -> None:
    assert usable_cpus(cgroup(tmp_path, line, files)) == min(cpus, CPUS)


def test_a_system_without_cgroups_has_the_cpus_of_the_affinity_mask(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path) == CPUS


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux restricts affinity")
def test_the_affinity_mask_limits_the_usable_cpus() -> None:
    script = "import os; os.sched_setaffinity(0, [0]); from gristmill.cpus import usable_cpus; print(usable_cpus())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "1\n"


@pytest.mark.skipif(sys.platform != "linux" or CPUS < 2, reason="needs an affinity mask that can leave a CPU out")
@pytest.mark.parametrize(
    ("given", "before", "threads"),
    [({}, "", "1"), ({"OMP_NUM_THREADS": "3"}, "", "3"), ({}, "import torch; ", "None")],
)
def test_fewer_usable_cpus_mean_fewer_threads_unless_the_user_says_otherwise_or_torch_is_loaded(
    given: dict[str, str], before: str, threads: str
) -> None:
    script = (
        f"{before}import os; os.sched_setaffinity(0, [0]); from gristmill.cpus import limit_threads; limit_threads()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    told = [sys.executable, "-c", f"{script}; print(os.environ.get('OMP_NUM_THREADS'))"]
    assert subprocess.run(told, env=environment, capture_output=True, text=True).stdout == f"{threads}\n"
