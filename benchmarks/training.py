"""Training steps beside transformers': tokens a second, share of the GEMM rate, peak memory.

    python benchmarks/training.py [SHAPE ...]

Each side is a process of its own (training_worker.py) with the same weights and the same tokens, new ones at every
step, so that each meets a routing never seen before: fixed ones flatter a CPU, whose matrix library prepares a kernel
for each shape. Their steps alternate. A step is forward, backward, clipping and AdamW. transformers trains bf16
weights, ours fp32 masters; the losses of the first step stand beside each other. Results go to
results/training.json, where shapes that were not run keep their last figures.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gristmill.hub import in_memory, write_published
from gristmill.kernels.experts import experts
from gristmill.kernels.memory import keep_freed_memory
from gristmill.model import ModelConfig, Transformer, init_weights, packed
from gristmill.model.counts import train_flops_per_token
from gristmill.train.machine import best_dtype, describe_machine

RESULTS = Path(__file__).with_name("results") / "training.json"
ROUNDS = 5
WARM_UP = 2

S = ModelConfig(
    d_model=512, n_layers=8, n_heads=8, kv_n_heads=2, ffn_hidden_size=512, moe_num_experts=16, moe_top_k=4,
    vocab_size=8192, max_seq_len=512, moe_loss_weight=0.0,
)  # fmt: skip
QUICKSTART = replace(S, d_model=256, n_layers=3, n_heads=4, ffn_hidden_size=128, vocab_size=4096)
QWEN3 = replace(S, norm="rms_norm", norm_eps=1e-6, qk_norm=True, clip_qkv=None)


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

# What kernels/memory.py asks of glibc without the user's help.
KEEP_FREED_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"}


@dataclass(frozen=True)
class Shape:
    """`skew` makes some experts popular. `env` is what both sides' processes start with, the others one side's."""

    model: ModelConfig
    batch: int = 16
    skew: float = 0.0
    dtype: str = str(best_dtype()).removeprefix("torch.")
    env: dict[str, str] = field(default_factory=dict)
    ours_env: dict[str, str] = field(default_factory=dict)
    theirs_env: dict[str, str] = field(default_factory=dict)


SHAPES = {
    "S": Shape(S),
    "quickstart": Shape(QUICKSTART),
    "vocab100k": Shape(replace(S, vocab_size=100352), batch=8),
    "seq4096": Shape(replace(S, max_seq_len=4096), batch=2),
    "unbalanced": Shape(S, skew=2.0),
    "S_qwen3_moe": Shape(QWEN3),
    "S_theirs_tuned": Shape(S, theirs_env=KEEP_FREED_MEMORY),
    "S_no_compiler": Shape(S, ours_env={"GRISTMILL_KERNELS": "torch"}),
    "S_avx2_fp32": Shape(
        S,
        dtype="float32",
        env=AVX2,
        ours_env={"GRISTMILL_KERNELS": "avx2"},
    ),
}


class Side:
    """One worker process and what it measured. What it says on standard error is shown if it fails."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None, python: str = sys.executable) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [python, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=os.environ | (env or {}),
        )  # fmt: skip
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes = 0

    def ask(self, line: str) -> Any:
        given, answers = self.process.stdin, self.process.stdout
        assert given is not None
        assert answers is not None
        given.write(f"{line}\n")
        given.flush()
        if not (answer := answers.readline()):
            self.said.seek(0)
            raise SystemExit(self.said.read()[-2000:])
        return json.loads(answer)

    def step(self, seed: int) -> None:
        figures = self.ask(str(seed))
        self.seconds.append(figures["seconds"])
        self.losses.append(figures["loss"])
        self.peak_bytes = figures["peak_bytes"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()


def worker(name: str, folder: Path, shape: Shape, env: dict[str, str]) -> Side:
    script = str(Path(__file__).with_name("training_worker.py"))
    return Side([script, name, str(folder), str(shape.batch), str(shape.model.max_seq_len), shape.dtype], env)


@torch.no_grad()
def route_as_trained(model: Transformer, skew: float) -> float:
    """Make routers tell tokens apart, as trained ones do; returns the busiest expert's load over the mean.

    In an untrained model what tokens have in common outweighs what they do not, and all of them go to the same few
    experts. Larger embeddings change that. `skew` makes experts popular to different degrees.
    """
    D = model.cfg.d_model
    common = torch.randn(D)
    model.wte.weight /= model.cfg.initializer_range
    model.wte.weight += 0.5 * common
    for block in model.blocks:
        weight_ED = block.ffn.router.weight
        weight_ED -= (weight_ED @ common)[:, None] * common / common.square().sum()
        weight_ED += skew * model.cfg.initializer_range * torch.randn(len(weight_ED), 1) * common / common.norm()
    tokens, one_document = torch.randint(model.wte.num_embeddings, (2, 512)), torch.zeros(2, 512)
    counts_LE = model(tokens, torch.arange(512).expand(2, -1), packed(one_document))[1].counts_LE.float()
    return float((counts_LE.amax(1) / counts_LE.mean(1)).mean())


def measure(shape: Shape) -> dict[str, Any]:
    torch.manual_seed(0)
    model = init_weights(Transformer(shape.model), seed=0)
    imbalance = route_as_trained(model, shape.skew)
    with tempfile.TemporaryDirectory() as temporary:
        write_published(Path(temporary), shape.model, in_memory(model.state_dict()), None)
        del model
        ours = worker("gristmill", Path(temporary), shape, shape.env | shape.ours_env)
        theirs = worker("transformers", Path(temporary), shape, shape.env | shape.theirs_env)
        rates = []
        try:
            for seed in range(WARM_UP + ROUNDS):
                ours.step(seed)
                theirs.step(seed)
                if seed >= WARM_UP:
                    rates.append(ours.ask("rate"))
        finally:
            ours.close()
            theirs.close()
    tokens = shape.batch * shape.model.max_seq_len
    first, second = ours.seconds[:2]
    mine, other = (statistics.median(side.seconds[WARM_UP:]) for side in (ours, theirs))
    pairs = zip(ours.seconds[WARM_UP:], theirs.seconds[WARM_UP:], strict=True)
    peak = statistics.median(rates)
    return {
        "ours_tokens_per_s": round(tokens / mine),
        "transformers_tokens_per_s": round(tokens / other),
        "ratio": round(statistics.median(b / a for a, b in pairs), 2),
        "gemm_peak_share": round(tokens / mine * train_flops_per_token(shape.model, shape.model.max_seq_len) / peak, 3),
        "gemm_peak_gflops": round(peak / 1e9),
        "memory_ratio": round(ours.peak_bytes / theirs.peak_bytes, 3),
        "ours_peak_gb": round(ours.peak_bytes / 1e9, 2),
        "first_step_over_second_s": round(first - second, 1),
        "losses": [round(ours.losses[0], 5), round(theirs.losses[0], 5)],
        "load_max_over_mean": round(imbalance, 2),
        "machine": machine(shape.dtype, shape.env),
    }


def machine(dtype: str, env: dict[str, str] | None = None) -> str:
    about = describe_machine()
    simd = " ".join(f"{name}={value}" for name, value in env.items()) if env else (about["simd"] or ["no SIMD"])[-1]
    load = os.getloadavg()[0]
    threads = torch.get_num_threads()
    return f"{about['cpu']} ({simd}), {threads} threads, {dtype}, torch {torch.__version__}, load {load:.1f}"


def moe_layer(T: int = 8192, D: int = 512, F: int = 512, E: int = 16, K: int = 4) -> dict[str, Any]:
    """The layer's forward and backward over its six GEMMs, were they dense: the floor that routing stands on."""
    keep_freed_memory()
    torch.manual_seed(0)
    dtype = best_dtype()
    w1, v1, w2 = (torch.nn.Parameter(torch.randn(E, F, D) * 0.02) for _ in range(3))
    x, grad = (torch.randn(T, D).to(dtype) for _ in range(2))
    x.requires_grad_()
    rows, hidden, act = (torch.randn(T * K, width).to(dtype) for width in (D, 2 * F, F))
    up, down = torch.randn(2 * F, D).to(dtype), torch.randn(F, D).to(dtype)

    def ours() -> None:
        weights, ids = torch.randn(T, E).softmax(-1).topk(K, dim=-1)
        experts(x, weights.requires_grad_(), ids, w1, v1, w2).backward(grad)
        for leaf in (x, w1, v1, w2):
            leaf.grad = None

    def dense() -> None:
        rows @ up.T, act @ down, rows @ down.T, act.T @ rows, hidden.T @ rows, hidden @ up

    times: dict[Callable[[], None], list[float]] = {ours: [], dense: []}
    for round_ in range(WARM_UP + 4 * ROUNDS):
        for way, seconds in times.items():
            started = time.perf_counter()
            way()
            if round_ >= WARM_UP:
                seconds.append(time.perf_counter() - started)
    return {
        "ours_ms": round(statistics.median(times[ours]) * 1e3, 1),
        "dense_ms": round(statistics.median(times[dense]) * 1e3, 1),
        "ratio_to_dense": round(statistics.median(a / b for a, b in zip(*times.values(), strict=True)), 3),
        "machine": machine(str(dtype)),
    }


def main(names: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or ["moe_layer", *SHAPES]:
        results[name] = moe_layer() if name == "moe_layer" else measure(SHAPES[name])
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(name, *(f"{key} {value}" for key, value in results[name].items()), sep="\n  ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
