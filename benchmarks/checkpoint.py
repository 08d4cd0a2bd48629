"""A checkpoint while training goes on: seconds until it is there, and what training loses by it.

    python benchmarks/checkpoint.py [tiny]

A model of 118M parameters with AdamW's state (1.4 GB in all) trains on this CPU and saves in three ways, in turn: ours
(`gristmill`: copied, written, fsynced, read back from the disk, hashed, committed), `torch.save`, after which training
goes on, and PyTorch's `dcp.async_save`; the last two with default settings, neither reads back what it wrote. Each save
begins after idle steps, and steps go on until it has ended, so that busy steps stand beside idle ones of the same
round. Files go to $TMPDIR, which should be on a disk; results to results/checkpoint.json. `tiny` only shows that
everything runs, and keeps none.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gristmill.kernels.loss import cross_entropy
from gristmill.kernels.memory import keep_freed_memory
from gristmill.model import ModelConfig, Transformer, init_weights, packed
from gristmill.model.counts import count_params
from gristmill.parallel.ranks import ALONE
from gristmill.train.checkpoint import Checkpoints, Identity, Saved, State
from gristmill.train.config import CheckpointConfig, OptimizerConfig
from gristmill.train.machine import best_dtype, describe_machine
from gristmill.train.optimizer import Optimizer

RESULTS = Path(__file__).with_name("results") / "checkpoint.json"
FULL = ModelConfig(
    d_model=512, n_layers=8, n_heads=8, kv_n_heads=2, ffn_hidden_size=512, moe_num_experts=16, moe_top_k=4,
    vocab_size=8192, max_seq_len=512,
)  # fmt: skip
TINY = ModelConfig(
    d_model=64, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2,
    vocab_size=256, max_seq_len=64,
)  # fmt: skip
ROUNDS = 5
IDLE_STEPS = 4
BATCH = 4

Done = Callable[[], bool]


class Training:
    """Steps on new random tokens."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg, self.model = cfg, init_weights(Transformer(cfg, best_dtype()), seed=0)
        self.optimizer = Optimizer(OptimizerConfig(name="adamw", lr=1e-4), self.model)

    def step(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        length = self.cfg.max_seq_len
        tokens = torch.randint(self.model.wte.num_embeddings, (BATCH, length))
        hidden, _ = self.model(tokens, torch.arange(length).expand(BATCH, -1), packed(torch.zeros(BATCH, length)))
        nll_sum, _ = cross_entropy(hidden.flatten(0, 1), self.model.output_weight, tokens.flatten())
        (nll_sum / tokens.numel()).backward()
        self.optimizer.clip()
        self.optimizer.step(1e-4)
        return time.perf_counter() - started

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.model.state_dict(), self.optimizer.state()


def ours(training: Training, folder: Path) -> Callable[[int], Done]:
    (folder / "tokenizer").mkdir()
    cfg, identity = CheckpointConfig(keep=1), Identity("benchmark", {}, {})
    checkpoints = Checkpoints(folder, cfg, identity, training.cfg, folder / "tokenizer", None, ALONE)

    def save(number: int) -> Done:
        checkpoints.save(State(number, {}, {}), *training.tensors(), {})

        def done() -> bool:
            events = checkpoints.finished()
            assert all(isinstance(event, Saved) for event in events), events
            return bool(events)

        return done

    return save


def torch_save(training: Training, folder: Path) -> Callable[[int], Done]:
    def save(number: int) -> Done:
        torch.save(training.tensors(), folder / f"{number}.pt")
        (folder / f"{number - 1}.pt").unlink(missing_ok=True)
        return lambda: True

    return save


def dcp_async(training: Training, folder: Path) -> Callable[[int], Done]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)

    def save(number: int) -> Done:
        model, optimizer = training.tensors()
        future: Any = dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / f"{number}")

        def done() -> bool:
            if future.done():
                future.result()
                shutil.rmtree(folder / f"{number - 1}", ignore_errors=True)
            return future.done()

        return done

    return save


def one_save(training: Training, save: Callable[[int], Done], number: int) -> dict[str, float]:
    """`seconds` is rounded up to the end of the step in which the save ended."""
    idle = [training.step() for _ in range(IDLE_STEPS)]
    started = time.perf_counter()
    done = save(number)
    stalled = time.perf_counter() - started
    busy = []
    while not done():
        busy.append(training.step())
    usual = statistics.median(idle)
    return {
        "seconds": time.perf_counter() - started,
        "stalled_seconds": stalled,
        "idle_step_seconds": usual,
        "busy_steps": len(busy),
        "lost_seconds": stalled + sum(busy) - usual * len(busy),  # what training is later for all of it
    }


def main(cfg: ModelConfig, rounds: int) -> dict[str, Any]:
    keep_freed_memory()
    torch.manual_seed(0)
    training = Training(cfg)
    num_bytes = sum(tensor.nbytes for group in training.tensors() for tensor in group.values())
    sides: dict[str, list[dict[str, float]]] = {"gristmill": [], "torch.save": [], "dcp.async_save": []}
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, name) for name in sides]
        for folder in folders:
            folder.mkdir()
        makers = (ours, torch_save, dcp_async)
        saves = [maker(training, folder) for maker, folder in zip(makers, folders, strict=True)]
        for number in range(rounds + 1):
            for (name, figures), save in zip(sides.items(), saves, strict=True):
                measured = one_save(training, save, number)
                if number:  # the first round warms up: planning, memory, files
                    figures.append(measured)
                    print(name, {key: round(value, 3) for key, value in measured.items()}, flush=True)
    medians = {
        name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for name, figures in sides.items()
    }
    for name, figures in medians.items():
        print(
            f"{name:<15} {figures['seconds']:7.2f} s, training stands still for {figures['stalled_seconds']:.2f} s "
            f"({figures['stalled_seconds'] / figures['seconds']:.0%}) and is {figures['lost_seconds']:.2f} s later"
        )
    return {
        "machine": describe_machine(),
        "params": count_params(cfg).total_params,
        "bytes": num_bytes,
        "rounds": rounds,
        "medians": medians,
        "all": sides,
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["tiny"]:
        main(TINY, 1)
    else:
        results = main(FULL, ROUNDS)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
