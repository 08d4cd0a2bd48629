"""What the system is told about memory.

glibc maps each large temporary afresh from the kernel and gives it back when it is freed, so that every
activation pays for page faults again: up to half of a training step on a CPU.
"""

import ctypes
import sys
from pathlib import Path

from torch import Tensor

# Names and numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MADV_HUGEPAGE = 14  # from sys/mman.h
HUGE_PAGE = 2**21  # bytes
CACHE_LINE = 64  # bytes


def keep_freed_memory() -> None:
    """Tell glibc to serve large blocks from its heap and never to trim it. Does nothing on other systems."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from musl
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_huge_pages(memory: Tensor) -> None:
    """Ask Linux for pages of 2 MiB where the tensor lies, before it is written: what is read from one end to the other
    then costs few looks into page tables."""
    start = -(-memory.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (memory.data_ptr() + memory.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)


def available_bytes() -> float:
    """Return the memory and swap space that a process can still take; infinity where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    sizes = [line.split()[1] for line in lines if line.startswith(("MemAvailable:", "SwapFree:"))]
    return sum(int(kibibytes) * 1024 for kibibytes in sizes) if sizes else float("inf")
