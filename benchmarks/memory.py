"""What a bound on memory costs: tokens/s of decoding by the share of the experts that finds room.

    python benchmarks/memory.py MODEL     MODEL: a Hugging Face directory, quantized or not

Each bound is a process of its own: greedy decoding of 48 tokens after a prompt of 64, three times, of which the last
counts. Printed, not kept: random weights choose experts more evenly than trained ones, and pages of the files that
the system has to spare make disks look fast.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def measure(path: Path, memory_bytes: int | None) -> None:
    import torch

    from gristmill.inference import EngineConfig, Request, Sampling, load_engine
    from gristmill.inference.memory import resident_bytes

    engine = load_engine(path, EngineConfig(cache_tokens=1024, token_budget=64), memory_bytes=memory_bytes)
    vocabulary, rate = engine.model.wte.num_embeddings, 0.0
    for seed in range(3):
        prompt = torch.randint(vocabulary, (64,), generator=torch.Generator().manual_seed(seed)).tolist()
        stream = engine.submit(Request(prompt=prompt, max_tokens=48, sampling=Sampling(temperature=0.0)))
        engine.step()
        started = time.perf_counter()
        made = sum(len(piece.tokens) for piece in stream)
        rate = (made - 1) / (time.perf_counter() - started)
    cache = getattr(engine.runner.layers, "cache", None)
    slots, hits = (None, None) if cache is None else (len(cache.slots), cache.hits / (cache.hits + cache.misses))
    print(json.dumps({"tokens_per_s": round(rate, 1), "slots": slots, "hits": hits, "resident": resident_bytes()}))


def main() -> None:
    path = Path(sys.argv[1])
    if len(sys.argv) > 2:
        measure(path, None if sys.argv[2] == "all" else int(sys.argv[2]))
        return
    print(f"load {os.getloadavg()[0]:.1f}; memory in MiB, of which the process without pages of files took")
    for mib in (None, 1400, 1100, 900, 800, 700):
        bound = "all" if mib is None else str(mib * 2**20)
        done = subprocess.run([sys.executable, __file__, str(path), bound], capture_output=True, text=True, check=False)
        if done.returncode:
            print(mib, done.stderr.strip().splitlines()[-1])
            continue
        found = json.loads(done.stdout)
        hits = "" if found["hits"] is None else f"{found['slots']} experts in memory, {found['hits']:.0%} found there"
        print(f"{mib or 'all':>6} {found['resident'] >> 20:>6} {found['tokens_per_s']:>7} tokens/s  {hits}")


if __name__ == "__main__":
    main()
