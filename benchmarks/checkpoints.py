"""Import and export of a sharded checkpoint: seconds, and the most anonymous memory that the process held.

    python benchmarks/checkpoints.py [GB] [FOLDER]

A synthetic DBRX of about GB (6) in bf16 is written to FOLDER (a temporary one), imported and exported again by the
command line, and compared tensor by tensor with what it was. Anonymous memory (RssAnon) is what the process itself
holds; maps of the files that it reads (RssFile) can be dropped at any time and are not counted.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from gristmill.hub import Weight, open_weights, write_published
from gristmill.hub.mapping import shapes
from gristmill.model import ModelConfig
from gristmill.model.counts import count_params

SHAPE = ModelConfig(d_model=2048, n_layers=1, n_heads=16, kv_n_heads=8, ffn_hidden_size=3584, vocab_size=100352)


def shape_of(num_bytes: float) -> ModelConfig:
    """As many layers as come nearest."""
    one, two = (count_params(replace(SHAPE, n_layers=n)).total_params * 2 for n in (1, 2))
    return replace(SHAPE, n_layers=max(1, round((num_bytes - one) / (two - one)) + 1))


def random_weights(cfg: ModelConfig) -> dict[str, Weight]:
    def make(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
        numbers = torch.randint(-9, 10, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
        return numbers.bfloat16()

    return {
        name: Weight(shape, torch.bfloat16, lambda seed=seed, shape=shape: make(seed, shape))  # type: ignore[misc]
        for seed, (name, shape) in enumerate(shapes(cfg).items())
    }


def watched(*command: str | Path) -> tuple[float, float]:
    """Seconds, and the largest RssAnon in GB, of a `gristmill` command."""
    started, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "gristmill.cli", *map(str, command)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            break
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            most = max(most, int(found[1]))
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - started, most * 1024 / 1e9


def main(gigabytes: float, folder: Path) -> None:
    cfg = shape_of(gigabytes * 1e9)
    source, ours, again = folder / "published", folder / "imported", folder / "exported"
    source.mkdir()
    write_published(source, cfg, random_weights(cfg), None, max_shard_bytes=2 * 10**9)
    before, size = open_weights(source), sum(file.stat().st_size for file in source.glob("*.safetensors"))
    largest = max(weight.nbytes for weight in before.values())
    print(
        f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files; largest tensor {largest / 1e9:.2f} GB"
    )
    figures = {}
    for verb, command in (("import", ("import", source, ours)), ("export", ("export", ours, again))):
        seconds, most = watched(*command)
        figures[verb] = {"seconds": round(seconds, 1), "rss_anon_gb": round(most, 2)}
        print(f"{verb}: {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s, RssAnon at most {most:.2f} GB")
    after = open_weights(again)
    same = before.keys() == after.keys() and all(torch.equal(before[n].load(), after[n].load()) for n in before)
    print("every tensor is bit for bit what it was" if same else "TENSORS DIFFER")
    print(json.dumps({"bytes": size, "largest_tensor_bytes": largest, **figures, "identical": same}))
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    wanted = float(sys.argv[1]) if len(sys.argv) > 1 else 6.0
    if len(sys.argv) > 2:
        main(wanted, Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as temporary:
        main(wanted, Path(temporary))
