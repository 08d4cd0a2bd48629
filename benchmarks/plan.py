"""What `gristmill plan` says beside what happens: peak memory and step time of small trainings on this machine's CPU.

    python benchmarks/plan.py [CASE ... | none]        none: plan again beside what was measured

Each case is a process of its own that takes the loop's own steps (train/gradients.py, then clipping and the optimizer)
on random tokens. Memory is VmHWM over the steps, less what the process held after its imports and its own rates. It is
measured twice: as training runs, where glibc keeps what is freed (kernels/memory.py), and in a second process where
glibc maps every block and gives it back, so that what is resident is what is allocated. The first stands beside all
that a plan says is needed, the second beside it without the allocator's reserve.

Time is the processor's, of all threads over their number, so that a machine which others use too can be measured; what
one thread does alone counts half on two. `wall_s` in the results is the clock's. The rates that a plan of a CPU needs,
of a square product and of a copy, are measured between the steps by the same time.

`of N ranks` is one process with FSDP's weights split N ways over a process group that sends nothing (torch's `fake`):
memory is a rank's, the numbers in it are not. Results go to results/plan.json, and in short to
src/gristmill/plan/measured.json, so that each plan can say how far off plans were.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import machine, route_as_trained

from gristmill.kernels.memory import keep_freed_memory
from gristmill.model import ModelConfig, init_weights
from gristmill.model.counts import count_params
from gristmill.parallel.apply import build_model
from gristmill.parallel.config import Layout, ParallelConfig
from gristmill.parallel.mesh import make_mesh, part_of
from gristmill.plan.footprint import Training
from gristmill.plan.hardware import cpu
from gristmill.plan.search import LIBRARIES, search
from gristmill.streaming.batches import Batch
from gristmill.train.balance import Balance
from gristmill.train.config import OptimizerConfig, TrainConfig
from gristmill.train.gradients import Gradients
from gristmill.train.optim import OPTIMIZERS
from gristmill.train.optimizer import Optimizer

RESULTS = Path(__file__).with_name("results") / "plan.json"
MEASURED = Path(__file__).parents[1] / "src/gristmill/plan/measured.json"
STEPS = 4
WARM_UP = 1
# glibc maps every block afresh and gives it back when it is freed.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "10000000"}
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}  # a thread that waits for another takes no time


@dataclass(frozen=True, kw_only=True)
class Case:
    d_model: int
    n_layers: int
    ffn_hidden_size: int
    vocab_size: int = 8192
    seq_len: int = 512
    micro_batch: int = 16
    micro_batches: int = 1
    recompute: str = "none"
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    ranks: int = 1

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            d_model=self.d_model, n_layers=self.n_layers, n_heads=self.d_model // 64, kv_n_heads=2,
            ffn_hidden_size=self.ffn_hidden_size, vocab_size=self.vocab_size, max_seq_len=self.seq_len,
        )  # fmt: skip

    @property
    def batch_tokens(self) -> int:
        return self.seq_len * self.micro_batch * self.micro_batches * self.ranks


SMALL = Case(d_model=256, n_layers=6, ffn_hidden_size=128)
MIDDLE = replace(SMALL, d_model=384, n_layers=8, ffn_hidden_size=256)
LARGE = replace(SMALL, d_model=512, n_layers=8, ffn_hidden_size=512)
CASES = {
    "small": SMALL,
    "small, 2,048 tokens a sequence": replace(SMALL, seq_len=2048, micro_batch=4),
    "small, fp32": replace(SMALL, dtype="float32", micro_batch=8),
    "small, vocabulary 100,352": replace(SMALL, vocab_size=100352, micro_batch=4),
    "middle": MIDDLE,
    "middle, selective recompute": replace(MIDDLE, recompute="selective"),
    "middle, full recompute": replace(MIDDLE, recompute="full"),
    "middle, 2 micro-batches, Muon": replace(MIDDLE, micro_batch=8, micro_batches=2, optimizer="muon"),
    "middle, of 4 ranks": replace(MIDDLE, ranks=4),
    "middle, full recompute, of 4 ranks": replace(MIDDLE, recompute="full", ranks=4),
    "large": LARGE,
    "large, 2 micro-batches, full recompute": replace(LARGE, micro_batch=8, micro_batches=2, recompute="full"),
    "large, 4,096 tokens a sequence": replace(LARGE, seq_len=4096, micro_batch=1),
}


def status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def of_processor(work: Callable[[], object]) -> float:
    """Seconds of the processor, over its threads; the best of ten."""
    times = []
    for _ in range(10):
        began = time.process_time()
        work()
        times.append((time.process_time() - began) / torch.get_num_threads())
    return min(times)


def rates_of(dtype: torch.dtype) -> Callable[[], tuple[float, float]]:
    """What measures (operations, bytes moved) a second; its own memory is there from now on, and does not grow."""
    a, b, out = (torch.ones(1024, 1024, dtype=dtype) for _ in range(3))
    source, target = torch.ones(2**24), torch.ones(2**24)

    def rates() -> tuple[float, float]:
        products = of_processor(lambda: [torch.mm(a, b, out=out) for _ in range(4)])
        return 4 * 2.0 * 1024**3 / products, 2 * source.nbytes / of_processor(lambda: target.copy_(source))

    rates()
    return rates


def train(case: Case, steps: int) -> dict[str, Any]:
    """In a process of its own: bytes above the imports at the highest, seconds a step, and this machine's rates."""
    mapped = "MALLOC_MMAP_THRESHOLD_" in os.environ
    if not mapped:
        keep_freed_memory()  # as training does
    dtype = getattr(torch, case.dtype)
    rates = rates_of(dtype)
    seen, baseline = [], status("VmRSS")
    torch.manual_seed(0)
    mesh = None
    if case.ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.ranks)
        mesh = make_mesh(Layout(1, case.ranks, 1, 1), "cpu")
    model = init_weights(build_model(case.model, dtype, "cpu", mesh, case.recompute), seed=0, part_of=part_of)  # type: ignore[arg-type]
    optimizer = Optimizer(OptimizerConfig(name=case.optimizer, lr=1e-4), model)
    if not mesh:
        route_as_trained(model, 0.0)
    cfg = TrainConfig(steps=steps, batch_tokens=case.batch_tokens, seq_len=case.seq_len, micro_batch=case.micro_batch)
    shape, rng = (cfg.sequences_per_batch // case.ranks, case.seq_len), np.random.default_rng(0)
    seconds: list[float] = []
    wall: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        gradients = Gradients(model, cfg, Balance(cfg, model), 1, Path(folder), mesh=mesh)
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(steps):
            tokens, zeros = rng.integers(0, case.vocab_size, shape), np.zeros(shape, np.int64)
            positions = np.broadcast_to(np.arange(case.seq_len), shape).copy()
            batch = Batch(tokens, tokens, positions, zeros, zeros[:, 0])
            started, began = time.perf_counter(), time.process_time()
            gradients.of(batch)
            optimizer.clip()
            optimizer.step(1e-4)
            wall.append(time.perf_counter() - started)
            seconds.append((time.process_time() - began) / torch.get_num_threads())
            bytes_ = status("VmHWM") - baseline
            seen.append(rates())
    flops, copied = (max(values) for values in zip(*seen, strict=True))
    took, passed = (statistics.median(times[WARM_UP:]) for times in (seconds, wall))
    return {"bytes": bytes_, "seconds": took, "wall_s": passed, "gemm_flops": flops, "copy_bytes_per_s": copied}


def child(case: Case, steps: int, env: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--train", json.dumps(asdict(case)), str(steps)]
    done = subprocess.run(command, env=os.environ | PASSIVE | env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout)


def measure(case: Case) -> dict[str, Any]:
    ran, mapped = child(case, STEPS, {}), child(case, 2, MAPPED)
    return {
        "params": count_params(case.model).total_params,
        **asdict(case),
        "measured_bytes": ran["bytes"],
        "measured_allocated_bytes": mapped["bytes"],
        "measured_s": ran["seconds"],
        "wall_s": ran["wall_s"],
        "gemm_flops": ran["gemm_flops"],
        "copy_bytes_per_s": ran["copy_bytes_per_s"],
        "machine": machine(case.dtype),
    }


def planned(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """What a plan says of it, with the rates that were measured."""
    training = Training(model=case.model, seq_len=case.seq_len, batch_tokens=case.batch_tokens,
                        optimizer=OPTIMIZERS[case.optimizer].cost, dtype=case.dtype)  # type: ignore[arg-type] # fmt: skip
    hardware = cpu(row["gemm_flops"], 10**12, row["copy_bytes_per_s"])
    mesh = ParallelConfig(shard=case.ranks)
    said = search(training, hardware, case.ranks, mesh, case.micro_batch, case.recompute).plan  # type: ignore[arg-type]
    return {
        "planned_bytes": said.needed_bytes,
        "planned_allocated_bytes": said.moment.total + LIBRARIES,
        "planned_s": said.times.step,
        "highest": said.moment.name,
        "parts": {part: size for part, size in said.moment.parts.items() if size},
    }


def main(names: list[str]) -> None:
    """names: of cases, "none" to plan again without measuring."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if names == ["none"] else names or CASES:
        results[name] = measure(CASES[name])
        _write(results)
        print(name, _errors(results[name]), flush=True)
    _write(results)


def _write(results: dict[str, Any]) -> None:
    kept = [name for name in CASES if name in results]
    for name in kept:
        results[name] |= planned(CASES[name], results[name])
    RESULTS.write_text(json.dumps({name: results[name] for name in kept}, indent=2) + "\n")
    keys = [f"{who}_{what}" for what in ("allocated_bytes", "bytes", "s") for who in ("measured", "planned")]
    cases = [{"case": name, **{key: results[name][key] for key in keys}} for name in kept]
    for case in cases:
        if CASES[case["case"]].ranks > 1:  # the numbers are not a rank's, and so neither is the time
            case |= {"planned_s": None, "measured_s": None}
    where = results[kept[0]]["machine"].partition(", load")[0]
    MEASURED.write_text(json.dumps({"machine": where, "cases": cases}, indent=2) + "\n")


def _errors(row: dict[str, Any]) -> str:
    whats = {"memory": "bytes", "allocated": "allocated_bytes", "step": "s"}
    return ", ".join(
        f"{said} {row[f'planned_{what}'] / row[f'measured_{what}'] - 1:+.1%}" for said, what in whats.items()
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        print(json.dumps(train(Case(**json.loads(sys.argv[2])), int(sys.argv[3]))))
    else:
        main(sys.argv[1:])
