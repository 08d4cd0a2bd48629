"""`@fused` compiles an elementwise function with torch.compile where a C++ compiler is there.

Only elementwise pieces are compiled: what fuses pays, and nothing whose shape follows the routing is traced.
Without a compiler the same functions run eagerly, with the same mathematics.
"""

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

# A variant is compiled for each dimension of size 0 or 1; past the default limit torch would run eagerly, silently.
torch._dynamo.config.recompile_limit = 64

F = TypeVar("F", bound=Callable[..., Any])

_enabled: bool | None = None


def compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use, or None; it needs Python's headers too."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return None
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def use_compiled(enabled: bool) -> None:
    """Choose fused (True) or eager (False) kernels for this process; the two round differently."""
    global _enabled
    _enabled = enabled


def uses_compiled() -> bool:
    global _enabled
    if _enabled is None:
        _enabled = compiler() is not None
    return _enabled


def fused(function: F) -> F:
    """Run `function` compiled with dynamic shapes, or eagerly: see `use_compiled`."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True)  # lazy: nothing happens until the first call

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return compiled(*args) if uses_compiled() else function(*args)

    return run  # type: ignore[return-value]
