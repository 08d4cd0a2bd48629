"""One training step's forward and backward: tokens a second, and the share of the machine's GEMM rate.

    python benchmarks/training_step.py [RECIPE]

Every step has a new routing and new documents, since fixed ones flatter a CPU: its matrix library prepares a kernel
for each shape that it has not met. Ours and the plain reference (the specification that the tests compare with) run
interleaved; medians are printed, with the largest difference of their losses beside them.
"""

import os
import statistics
import sys
import time
from dataclasses import replace
from unittest import mock

import torch

from gristmill.kernels.attention import packed_attention_reference
from gristmill.kernels.experts import experts_reference
from gristmill.kernels.loss import cross_entropy
from gristmill.kernels.memory import keep_freed_memory
from gristmill.model import ModelConfig, Transformer, packed
from gristmill.model.counts import train_flops_per_token
from gristmill.recipe import load_recipe
from gristmill.train.machine import best_dtype, describe_machine, gemm_flops

ROUNDS = 7


def step(model: Transformer, seed: int, batch: int, seq_len: int) -> float:
    torch.manual_seed(seed)
    tokens = torch.randint(0, model.wte.num_embeddings, (batch, seq_len))
    documents = (torch.rand(batch, seq_len) < 2 / seq_len).cumsum(1)
    hidden, routing = model(tokens, torch.arange(seq_len).expand(batch, -1), packed(documents))
    nll, _ = cross_entropy(hidden.flatten(0, 1), model.output_weight, tokens.flatten())
    loss = nll / tokens.numel() + routing.balance_loss
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


def reference_step(model: Transformer, seed: int, batch: int, seq_len: int) -> float:
    with (
        mock.patch("gristmill.model.transformer.experts", experts_reference),
        mock.patch("gristmill.model.transformer.packed_attention", packed_attention_reference),
    ):
        return step(model, seed, batch, seq_len)


def main(name: str = "quickstart") -> None:
    keep_freed_memory()
    recipe = load_recipe(name)
    cfg: ModelConfig = replace(recipe.model, max_seq_len=recipe.train.seq_len)
    batch, seq_len, dtype = recipe.train.micro_batch, recipe.train.seq_len, best_dtype()
    rate = gemm_flops(dtype)
    model = Transformer(cfg, dtype)
    ways = {"gristmill": step, "reference": reference_step}
    times: dict[str, list[float]] = {name: [] for name in ways}
    worst = 0.0
    for seed in range(ROUNDS + 2):
        losses = []
        for way, run in ways.items():
            started = time.perf_counter()
            losses.append(run(model, seed, batch, seq_len))
            if seed >= 2:  # the first rounds compile
                times[way].append(time.perf_counter() - started)
        worst = max(worst, abs(losses[0] - losses[1]))
    print(f"{describe_machine()['cpu']}, {torch.get_num_threads()} threads, {dtype}, load {os.getloadavg()[0]:.1f}")
    print(f"GEMM rate {rate / 1e9:,.0f} GFLOP/s; {batch} x {seq_len} tokens; largest loss difference {worst:.1e}")
    for way, seconds in times.items():
        per_second = batch * seq_len / statistics.median(seconds)
        share = per_second * train_flops_per_token(cfg, seq_len) / rate
        print(f"{way:<10} {per_second:>8,.0f} tokens/s  {share:.0%} of the GEMM rate")


if __name__ == "__main__":
    main(*sys.argv[1:])
