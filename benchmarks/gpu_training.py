"""Training steps on a GPU: tokens a second, share of the published peak, peak memory, beside transformers'.

    python benchmarks/gpu_training.py [SHAPE ...]        SHAPE: dbrx-1b, dbrx-3b

First every GPU kernel and a small model stand against float64 and fp32 on the CPU, and the errors are printed. Then
each side trains in a process of its own: forward, backward, clipping and AdamW on 4,096-token sequences, new tokens at
every step. Ours has fp32 masters; the other side is Qwen3-MoE of the same sizes with bf16 weights, since transformers'
own DBRX loops over its experts. `ours_packed` cuts the sequences into documents and masks them, which the other side
does not do. A side that runs out of memory says so. Results go to results/gpu_training.json, under the GPU's name.

This has never run on a GPU: only its parts that a CPU can run were tried.
"""

import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.attention import document_starts, packed_attention_reference
from gristmill.kernels.experts import experts_reference
from gristmill.kernels.loss import cross_entropy
from gristmill.kernels.rotary import rotary_angles
from gristmill.model import ModelConfig, Transformer, init_weights, packed
from gristmill.model.counts import count_params, train_flops_per_token
from gristmill.recipe import load_shape
from gristmill.train.config import OptimizerConfig
from gristmill.train.optimizer import Optimizer

RESULTS = Path(__file__).with_name("results") / "gpu_training.json"
SHAPES = ["dbrx-1b", "dbrx-3b"]
SIDES = ["ours", "ours_packed", "transformers"]
DEVICE = "cuda"
SEQ_LEN = 4096
BATCH = 4
WARM_UP = 3
ROUNDS = 10
DOCUMENT_TOKENS = 1000  # of ours_packed, on average
LR = 1e-4

# Dense bf16 operations a second, from NVIDIA's data sheets (half of what they print with sparsity); first match counts.
PEAKS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
}  # fmt: skip

Step = Callable[[Tensor], Tensor]


def bf16_peak() -> tuple[float, str]:
    """(operations a second, where the number comes from)."""
    name = torch.cuda.get_device_name()
    for part, peak in PEAKS.items():
        if part in name:
            return peak, f"published for {part}"
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * 8192**3 / min(seconds), "measured, 8192 x 8192 x 8192"


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, in float64 on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out))
    return [x.detach().cpu().double() for x in (out, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def largest_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Of output and gradients, each relative to its largest element."""
    pairs = zip(ours, exact, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def kernel_errors(dtype: torch.dtype) -> dict[str, float]:
    """The GPU functions on inputs of `dtype` against the references in float64."""
    gpu = {
        name: importlib.import_module(f"gristmill.kernels.gpu.{name}")
        for name in ("experts", "attention", "loss", "rotary")
    }
    torch.manual_seed(0)
    T, D, width, E, K = 700, 256, 384, 8, 4
    weights, ids = (
        (torch.randn(T, E) - 0.5 * torch.arange(E)).softmax(-1).topk(K, dim=-1)
    )  # some experts get few tokens
    moe = [torch.randn(T, D).to(dtype), weights, *(torch.randn(E, width, D).to(dtype).float() for _ in range(3))]
    starts = document_starts((torch.rand(2, 500) < 0.01).cumsum(1))
    qkv = [torch.randn(2, 500, heads, 64).to(dtype) for heads in (8, 2, 2)]
    logits, targets = (torch.randn(64, 100352) * 4).to(dtype), torch.randint(0, 100352, (64,))
    cos, sin = rotary_angles(torch.arange(500).expand(2, -1), 64, 10000.0)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    exact_logits = logits.double().requires_grad_()
    exact_nll = F.cross_entropy(exact_logits, targets, reduction="none")
    exact_nll.sum().backward()
    assert exact_logits.grad is not None
    loss = gpu["loss"].loss_and_gradient(logits.to(DEVICE), targets.to(DEVICE))
    there = {"ids": ids.to(DEVICE), "starts": starts.to(DEVICE), "cos": cos.to(DEVICE), "sin": sin.to(DEVICE)}

    def error(ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor]) -> float:
        on_gpu, in_float64 = [x.to(DEVICE) for x in inputs], [x.double() for x in inputs]
        return largest_error(gradients(ours, on_gpu), gradients(exact, in_float64))

    return {
        "experts": error(
            lambda x, w, *masters: gpu["experts"].experts(x, w, there["ids"], *masters),
            lambda x, w, *masters: experts_reference(x, w, ids, *masters),
            moe,
        ),
        "attention": error(
            lambda q, k, v: gpu["attention"].packed_attention(q, k, v, there["starts"]),
            lambda q, k, v: packed_attention_reference(q, k, v, starts),
            qkv,
        ),
        "loss": largest_error([x.cpu().double() for x in loss], [exact_nll.detach(), exact_logits.grad]),
        "rotary": error(lambda x: gpu["rotary"].rotate(x, there["cos"], there["sin"]), turned, qkv[:1]),
    }


def model_errors(dtype: torch.dtype) -> dict[str, float]:
    """A small model on the GPU against itself on the CPU in fp32: losses a token, and the norm of all gradients."""
    cfg = ModelConfig(
        d_model=256, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=128, moe_num_experts=8, moe_top_k=2,
        vocab_size=1024, max_seq_len=256,
    )  # fmt: skip
    torch.manual_seed(0)
    on_cpu = init_weights(Transformer(cfg, torch.float32), seed=0)
    on_gpu = Transformer(cfg, dtype)
    on_gpu.load_state_dict(on_cpu.state_dict())
    tokens, documents = torch.randint(0, 1024, (2, 256)), (torch.rand(2, 256) < 0.02).cumsum(1)
    figures = []
    for model, device in ((on_cpu, "cpu"), (on_gpu.to(DEVICE), DEVICE)):
        loss, each = loss_of(model, tokens.to(device), documents.to(device))
        loss.backward()
        norm = torch.nn.utils.get_total_norm([param.grad for param in model.parameters() if param.grad is not None])
        figures.append((each.cpu(), float(norm)))
    (exact, exact_norm), (ours, norm) = figures
    return {"nll": float((ours - exact).abs().max()), "gradient_norm": abs(norm / exact_norm - 1)}


def loss_of(model: Transformer, tokens_BS: Tensor, document_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(mean loss with the balancing loss, each token's [T])."""
    B, S = tokens_BS.shape
    positions_BS = torch.arange(S, device=tokens_BS.device).expand(B, -1)
    hidden, routing = model(tokens_BS, positions_BS, packed(document_ids_BS))
    nll, each = cross_entropy(hidden[:, :-1].flatten(0, 1), model.output_weight, tokens_BS[:, 1:].flatten())
    return nll / each.numel() + routing.balance_loss(), each


def ours(cfg: ModelConfig, in_documents: bool) -> Step:
    with torch.device(DEVICE):
        model = init_weights(Transformer(cfg, torch.bfloat16), seed=0).train()
    optimizer = Optimizer(OptimizerConfig(name="adamw", lr=LR), model)

    def step(tokens_BS: Tensor) -> Tensor:
        chance = 1 / DOCUMENT_TOKENS if in_documents else 0.0
        document_ids_BS = (torch.rand(tokens_BS.shape, device=DEVICE) < chance).cumsum(1)
        loss, _ = loss_of(model, tokens_BS, document_ids_BS)
        loss.backward()
        optimizer.clip()
        optimizer.step(LR)
        return loss.detach()

    return step


def transformers(cfg: ModelConfig) -> Step:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    theirs = Qwen3MoeConfig(
        hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.kv_n_heads, head_dim=cfg.head_dim, moe_intermediate_size=cfg.ffn_hidden_size,
        num_experts=cfg.moe_num_experts, num_experts_per_tok=cfg.moe_top_k, norm_topk_prob=True,
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.max_seq_len, tie_word_embeddings=False,
        dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device(DEVICE):
        model = Qwen3MoeForCausalLM(theirs).to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(tokens_BS: Tensor) -> Tensor:
        loss = model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def time_steps(side: str, cfg: ModelConfig) -> dict[str, Any]:
    """Seconds a step, the losses and the peak of allocated memory of one side, in this process."""
    torch.manual_seed(0)
    step = transformers(cfg) if side == "transformers" else ours(cfg, in_documents=side == "ours_packed")
    assert cfg.vocab_size is not None
    seconds, losses = [], []
    for seed in range(WARM_UP + ROUNDS):
        torch.manual_seed(seed)
        tokens_BS = torch.randint(0, cfg.vocab_size, (BATCH, SEQ_LEN), device=DEVICE)
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(float(step(tokens_BS)))  # waits for the device
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if side != "transformers" and "gristmill.kernels.gpu.triton_kernels" not in sys.modules:
        raise SystemExit("the model ran without the GPU kernels: gristmill.kernels does not call them")
    return {
        "seconds": seconds[WARM_UP:],
        "losses": [losses[0], losses[-1]],
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def measure(side: str, name: str) -> dict[str, Any]:
    """One side in a process of its own; its figures, or why there are none."""
    command = [sys.executable, __file__, "--side", side, name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        return {"failed": "out of memory" if "OutOfMemoryError" in result.stderr else lines[-1]}
    figures = json.loads(result.stdout.splitlines()[-1])
    cfg = load_shape(name).model
    peak, source = bf16_peak()
    tokens_per_s = BATCH * SEQ_LEN / statistics.median(figures["seconds"])
    return {
        "tokens_per_s": round(tokens_per_s),
        "mfu": round(tokens_per_s * train_flops_per_token(cfg, SEQ_LEN) / peak, 4),
        "peak_flops": f"{peak:.4g}, {source}",
        "ms_a_step": [round(1e3 * pick(figures["seconds"]), 1) for pick in (min, statistics.median, max)],
        "peak_memory_gb": round(figures["peak_bytes"] / 1e9, 2),
        "losses": [round(loss, 4) for loss in figures["losses"]],
    }


def main(names: list[str]) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu_training.py needs a CUDA GPU; benchmarks/training.py measures a CPU")
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens_a_step": BATCH * SEQ_LEN}
    print(about)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    mine = results.setdefault(about["gpu"], {})
    mine |= about
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        errors = {**kernel_errors(dtype), "model": model_errors(dtype)}
        mine[f"errors_{short}"] = errors
        print(f"errors {short}", *(f"{key} {value}" for key, value in errors.items()), sep="\n  ", flush=True)
    for name in names or SHAPES:
        counts = count_params(load_shape(name).model)
        mine[name] = {"total_params": counts.total_params, "active_params": counts.active_params}
        for side in SIDES:
            mine[name][side] = measure(side, name)
            print(name, side, mine[name][side], flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side, name = sys.argv[2:]
        print(json.dumps(time_steps(side, load_shape(name).model)))
    else:
        main(sys.argv[1:])
