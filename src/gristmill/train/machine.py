"""What this machine is, how fast it multiplies, and how a training rounds on it."""

import os
import platform
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gristmill.cpus import usable_cpus
from gristmill.errors import InputError
from gristmill.kernels import native
from gristmill.parallel.config import Layout
from gristmill.plan.hardware import GPUS
from gristmill.train.config import TrainConfig


def best_dtype() -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    fast = not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"}) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def gemm_flops(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a square matrix product: the largest rate of those that fit in `seconds`,
    since other work only makes a product slower."""
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(times)


def data_sheet_flops(dtype: torch.dtype) -> float | None:
    """Floating-point operations a second by the GPU's data sheet, dense; None for CPUs, whose makers state no such
    rate, and for GPUs that the table does not have."""
    if not torch.cuda.is_available() or dtype != torch.bfloat16:
        return None
    words = re.split(r"[^a-z0-9]+", torch.cuda.get_device_name().lower())
    if {"pcie", "nvl", "mig"} & set(words):  # the table is of SXM modules
        return None
    return next((gpu.flops for name, gpu in GPUS.items() if name.partition("-")[0] in words), None)


def copy_rate() -> float:
    """Bytes that a large copy in memory reads and writes a second: the best of five."""
    source, times = torch.ones(2**26), []
    target = torch.empty_like(source)
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return 2.0 * source.nbytes / min(times)


def choose_compute(cfg: TrainConfig, layout: Layout, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings that decide rounding: as recorded, or else from the configuration and the machine.

    On ranks that are laid out in another way sums are rounded anew anyway, so there the threads are chosen again.
    """
    lies = asdict(layout)
    if recorded and recorded["layout"] == lies:
        return recorded
    on_gpu = torch.cuda.is_available()
    chosen = {
        "device": "cuda" if on_gpu else "cpu",
        "dtype": cfg.dtype or str(best_dtype()).removeprefix("torch."),
        "threads": cfg.threads or torch.get_num_threads(),
        "kernels": "gpu" if on_gpu else native.in_use(),
        "compile": cfg.compile,
        "layout": lies,
    }
    return chosen if recorded is None else recorded | {name: chosen[name] for name in ("threads", "layout")}


def apply_compute(compute: dict[str, Any]) -> dict[str, Any]:
    """Make this process round as the recorded settings do. Raises InputError where it cannot."""
    if compute["device"] == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this training began on a GPU and there is none now: go on where one is, or begin anew in another --out"
        )
    if compute["device"] == "cpu" and compute["kernels"] not in (possible := native.available()):
        raise InputError(
            f"this training began with {compute['kernels']} kernels, and here are {', '.join(possible)}: go on where "
            "they are (a C++ compiler and a new installation bring the native ones), or begin anew in another --out"
        )
    if compute["device"] == "cpu":
        native.use(compute["kernels"])
    torch.set_num_threads(compute["threads"])
    return compute


def describe_machine() -> dict[str, Any]:
    known = getattr(os, "sysconf_names", {})
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in known else 0
    flags = _cpu_flags()
    return {
        "cpu": _cpu_name(),
        "cores": usable_cpus(),
        "memory_gib": round(memory / 2**30, 1),
        "simd": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": native.available()[-1],
        "system": f"{platform.system()} {platform.release()}",
    }


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()
