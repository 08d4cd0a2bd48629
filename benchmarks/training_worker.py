"""One side of `training.py`: a process that builds a model, then runs a step for each seed that it is sent.

    python benchmarks/training_worker.py SIDE MODEL BATCH SEQ_LEN DTYPE       SIDE: gristmill or transformers

MODEL is a Hugging Face directory. Lines on standard input are seeds; for each a line of JSON comes back. "rate" asks
for the machine's GEMM rate as this process sees it.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gristmill.train.machine import gemm_flops

Step = Callable[[Tensor], float]
LR = 1e-4


def gristmill(folder: Path, dtype: torch.dtype) -> Step:
    from gristmill.hub import assemble, read_published
    from gristmill.kernels.loss import cross_entropy
    from gristmill.kernels.memory import keep_freed_memory
    from gristmill.model import packed
    from gristmill.train.config import OptimizerConfig
    from gristmill.train.neighbors import Neighbors
    from gristmill.train.optimizer import Optimizer

    keep_freed_memory()  # as training does
    neighbors = Neighbors(torch.get_num_threads())
    model = assemble(*read_published(folder), dtype).requires_grad_().train()
    optimizer = Optimizer(OptimizerConfig(name="adamw", lr=LR), model)

    def step(tokens_BS: Tensor) -> float:
        B, S = tokens_BS.shape
        one_document = torch.zeros(B, S, dtype=torch.long)
        hidden, _routing = model(tokens_BS, torch.arange(S).expand(B, -1), packed(one_document))
        nll, _ = cross_entropy(hidden[:, :-1].flatten(0, 1), model.output_weight, tokens_BS[:, 1:].flatten())
        loss = nll / (B * (S - 1))
        loss.backward()
        optimizer.clip()
        optimizer.step(LR)
        neighbors.look()
        return float(loss.detach())

    return step


def transformers(folder: Path, dtype: torch.dtype) -> Step:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(tokens_BS: Tensor) -> float:
        loss = model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main(side: str, folder: str, batch: str, seq_len: str, dtype: str) -> None:
    build = {"gristmill": gristmill, "transformers": transformers}[side]
    step = build(Path(folder), getattr(torch, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of training, without that of loading
    vocab_size = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
    for line in sys.stdin:
        if line.strip() == "rate":
            print(json.dumps(gemm_flops(getattr(torch, dtype))), flush=True)
            continue
        torch.manual_seed(int(line))
        tokens_BS = torch.randint(0, vocab_size, (int(batch), int(seq_len)))
        started = time.perf_counter()
        loss = step(tokens_BS)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
