"""Keep freed memory in the process.

glibc maps each large temporary afresh from the kernel and gives it back when it is freed, so that every
activation pays for page faults again: up to half of a training step on a CPU.
"""

import ctypes
import sys

# Names and numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Tell glibc to serve large blocks from its heap and never to trim it. Does nothing on other systems."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from musl
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
