"""How many CPUs this process may use: containers, batch systems and laptops give it fewer than the machine has."""

import math
import os
import sys
from pathlib import Path, PurePosixPath


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: those of its affinity mask, or fewer under a cgroup's CPU quota, rounded up.

    Args:
        root: where /proc and /sys are; tests give another folder.
    """
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, _quota(root))))


def limit_threads() -> None:
    """Give OpenMP as many threads as there are usable CPUs where a quota or the affinity mask leaves fewer than all.

    The runtime reads the variable when torch is loaded: later, and where the user has set it, this changes nothing.
    """
    if "torch" not in sys.modules and (cpus := usable_cpus()) < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))


def _quota(root: Path) -> float:
    """The smallest CPU quota of this process's cgroups, in CPUs; infinite where there is none."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no cgroups here
        return math.inf
    smallest = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"]
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for group in (inside, *inside.parents):  # an ancestor's quota holds for all below it
                smallest = min(smallest, _quota_of(mount / group))
    return smallest


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():  # version 2: "150000 100000" or "max 100000"
            quota, period = (group / "cpu.max").read_text().split()
        else:  # version 1: -1 is no quota
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
