"""Rates and sizes of one GPU and its links, as published by their makers.

Bandwidths are for one direction, whereas data sheets print NVLink's two directions together. `network` is a GPU's share
of its node's network cards.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU or CPU.

    Args:
        flops: dense bf16 operations per second.
        memory_bytes, memory_bandwidth: of its own memory (HBM).
        nvlink, network: bytes per second in one direction, to the GPUs of its node and to those of other nodes.
        dense, grouped, attention: assumed shares of `flops` that plain products, the experts' products and
            attention's products reach.
        source: the origin of each number.
    """

    name: str
    flops: float
    memory_bytes: int
    memory_bandwidth: float
    nvlink: float
    network: float
    per_node: int
    attention: float
    source: str
    dense: float = 0.7
    grouped: float = 0.55
    on_gpu: bool = True


_FLASH = "FlashAttention-2 (arXiv:2307.08691): up to 225 TFLOP/s in training on A100, 335 in its kernels on H100"

GPUS = {
    "a100-80": Hardware(
        name="a100-80",
        flops=312e12,
        memory_bytes=80 * 10**9,
        memory_bandwidth=2.039e12,
        nvlink=300e9,
        network=25e9,
        per_node=8,
        attention=0.6,
        source="NVIDIA's A100 80GB SXM data sheet; network: DGX A100 data sheet, one 200 Gb/s card a GPU; attention: "
        + _FLASH,
    ),
    "h100": Hardware(
        name="h100",
        flops=989e12,
        memory_bytes=80 * 10**9,
        memory_bandwidth=3.35e12,
        nvlink=450e9,
        network=50e9,
        per_node=8,
        attention=0.34,
        source="NVIDIA's H100 SXM data sheet, without sparsity; network: DGX H100 data sheet, one 400 Gb/s card a GPU; "
        "attention: " + _FLASH,
    ),
    "h200": Hardware(
        name="h200",
        flops=989e12,
        memory_bytes=141 * 10**9,
        memory_bandwidth=4.8e12,
        nvlink=450e9,
        network=50e9,
        per_node=8,
        attention=0.34,
        source="NVIDIA's H200 SXM data sheet, without sparsity; network: DGX H200 data sheet, one 400 Gb/s card a GPU; "
        "attention: as on H100",
    ),
    "b200": Hardware(
        name="b200",
        flops=2250e12,
        memory_bytes=180 * 10**9,
        memory_bandwidth=8e12,
        nvlink=900e9,
        network=50e9,
        per_node=8,
        attention=0.15,
        source="NVIDIA's DGX B200 data sheet, an eighth of it, without sparsity, one 400 Gb/s card a GPU; attention: "
        "the operations a second of H100, since torch's FlashAttention-2 was not written for it (a guess)",
    ),
}


def cpu(flops: float, memory_bytes: int, memory_bandwidth: float = 20e9) -> Hardware:
    """Return the hardware of a process on a CPU with the given rates. Processes are assumed to communicate through
    gloo, over memory or a 10 Gb/s network."""
    return Hardware(
        name="cpu",
        flops=flops,
        memory_bytes=memory_bytes,
        memory_bandwidth=memory_bandwidth,
        nvlink=2e9,
        network=1.25e9,
        per_node=1,
        # docs/performance.md: products at 350 of 400 GFLOP/s, attention's tiles at 210 to 230
        dense=0.875,
        grouped=0.875,
        attention=0.55,
        source="rates: measured or given; shares: docs/performance.md, of two Zen 4 cores",
        on_gpu=False,
    )
