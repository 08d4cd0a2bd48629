"""Batches from shards beside plain memory mapping and MosaicML Streaming: tokens a second, a batch's share of a step.

    python benchmarks/streaming.py [MILLIONS_OF_TOKENS]

Three sources of invented documents become shards as `gristmill shards` writes them. In each round every way reads as
many batches, in turn:

- ours, which also gives positions and document numbers;
- memmap: the same windows from flat files mapped by NumPy, the least that reading them costs. The two are compared;
- mosaicml: its StreamingDataset, shuffling, over the same shards. It shuffles samples, which are whole blocks here, so
  that the windows of a block follow each other: less shuffled, and less work;
- mosaicml_by_sequence: the same over shards cut anew for the sequence length, as it is used where windows shall mix.

Each is one process without helpers, and the files are in memory. MosaicML's (streaming_worker.py) are not run where
`make interop` has not been. Results go to results/streaming.json.
"""

import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from training import RESULTS as TRAINING
from training import Side, machine

from gristmill.streaming import Batches, MDSWriter, MixPhase, ShardsConfig
from gristmill.streaming.build import Stream, write_blocks

RESULTS = TRAINING.with_name("streaming.json")
ROOT = Path(__file__).parents[1]
THEIR_PYTHON = ROOT / ".interop" / "bin" / "python"
ROUNDS = 9
WARM_UP = 2
BATCHES = 100  # in a round
BATCH_TOKENS = 8192  # the quickstart's
SEQ_LENS = (512, 2048)
WEIGHTS = {"code": 6.0, "prose": 3.0, "talk": 1.0}
VOCAB_SIZE = 4096


def write_source(out: Path, flat: Path, num_tokens: int, seed: int) -> None:
    """Documents of about 700 ids as a source's shards, and the stream of their ids in one file."""
    chance = np.random.default_rng(seed)
    out.mkdir(parents=True)
    stream = Stream(flat.with_suffix(".spool"), np.dtype("uint16"))
    left = num_tokens
    while left > 0:
        ids = chance.integers(1, VOCAB_SIZE, min(left, int(chance.exponential(700)) + 1), np.uint16)
        stream.append(f"{left}", 0, ids)  # type: ignore[arg-type] # what a list of ids becomes
        left -= len(ids)
    stream.close()
    cfg = ShardsConfig()
    blocks = write_blocks(cfg, stream, out)
    stream.read(0, blocks * cfg.block_tokens + 1).tofile(flat)
    stream.spool.unlink()


def cut(flat: np.ndarray, seq_len: int, out: Path) -> None:
    """Shards whose samples are windows."""
    out.mkdir(parents=True)
    with MDSWriter(out, {"tokens": f"ndarray:uint16:{seq_len + 1}"}) as writer:
        for first in range(0, len(flat) - 1, seq_len):
            writer.write({"tokens": flat[first : first + seq_len + 1]})


def mapped(flats: list[np.ndarray], sources: list[int], windows: list[int], seq_len: int) -> np.ndarray:
    """The floor: windows of flat files, copied into a batch."""
    ids = np.empty((len(sources), seq_len + 1), np.int64)
    for row, (source, window) in enumerate(zip(sources, windows, strict=True)):
        ids[row] = flats[source][window * seq_len : window * seq_len + seq_len + 1]
    return ids


def checksum(tokens: np.ndarray, targets: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(targets), zlib.crc32(np.ascontiguousarray(tokens)))


def timed(read: Callable[[int], Any], steps: range, check: Callable[[Any], int]) -> tuple[list[float], list[int]]:
    """Seconds and a checksum for each step's batch. Checksums are not in the time."""
    seconds, sums = [], []
    for step in steps:
        started = time.perf_counter()
        batch = read(step)
        seconds.append(time.perf_counter() - started)
        sums.append(check(batch))
    return seconds, sums


def measure(shards: Path, flats: dict[str, np.ndarray], seq_len: int, others: dict[str, Side]) -> dict[str, Any]:
    sequences, rounds = BATCH_TOKENS // seq_len, WARM_UP + ROUNDS
    batches = Batches(shards, seq_len, sequences, rounds * BATCHES, [MixPhase(until=1.0, mix=WEIGHTS)], seed=0)
    by_number = [flats[name] for name in batches.source_names]
    places = [[part.tolist() for part in batches.samples(step)] for step in range(rounds * BATCHES)]
    seconds: dict[str, list[float]] = {"ours": [], "memmap": [], **{way: [] for way in others}}
    single: list[float] = []
    differing = 0
    for number in range(rounds):
        steps = range(number * BATCHES, (number + 1) * BATCHES)
        ours, sums = timed(batches.batch, steps, lambda batch: checksum(batch.tokens, batch.targets))
        floor, expected = timed(
            lambda step: mapped(by_number, *places[step], seq_len), steps, lambda ids: checksum(ids[:, :-1], ids[:, 1:])
        )
        differing += sum(a != b for a, b in zip(sums, expected, strict=True))
        taken = {"ours": sum(ours), "memmap": sum(floor)}
        taken |= {way: side.ask(f"{seq_len} {sequences} {BATCHES}")["seconds"] for way, side in others.items()}
        if number >= WARM_UP:
            single += ours
            for way in seconds:
                seconds[way].append(taken[way])
    return {
        **{f"{way}_tokens_per_s": round(BATCH_TOKENS * BATCHES / statistics.median(seconds[way])) for way in seconds},
        **{f"ratio_to_{way}": ratio(seconds["ours"], seconds[way]) for way in seconds if way != "ours"},
        "batches_compared": rounds * BATCHES,
        "batches_that_differ": differing,
        "batch_ms": round(statistics.median(single) * 1e3, 3),
        "batch_ms_99th_percentile": round(statistics.quantiles(single, n=100)[-1] * 1e3, 3),
    }


def ratio(ours: list[float], other: list[float]) -> float:
    return round(statistics.median(b / a for a, b in zip(ours, other, strict=True)), 3)


def beside_training(figures: dict[str, Any]) -> dict[str, Any]:
    """A batch as a share of the quickstart's step."""
    training = json.loads(TRAINING.read_text())["quickstart"]["ours_tokens_per_s"]
    return {
        "training_tokens_per_s": training,
        "ratio_to_training": round(figures["ours_tokens_per_s"] / training, 1),
        "share_of_step": round(figures["batch_ms"] / 1e3 / (BATCH_TOKENS / training), 6),
        "share_of_step_99th_percentile": round(
            figures["batch_ms_99th_percentile"] / 1e3 / (BATCH_TOKENS / training), 6
        ),
    }


def start_theirs(shards: Path, temporary: str) -> Side:
    command = ["-P", str(Path(__file__).with_name("streaming_worker.py")), str(shards), json.dumps(WEIGHTS)]
    env = {"PYTHONPATH": str(ROOT / "tests" / "interop" / "stub"), "TMPDIR": temporary}  # it leaves its locks behind
    return Side(command, env, str(THEIR_PYTHON))  # -P: their package has this file's name


def main(millions: str = "128") -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards, flats = folder / "shards", {}
        for seed, (name, weight) in enumerate(WEIGHTS.items()):
            share = weight / sum(WEIGHTS.values())
            write_source(shards / name, folder / f"{name}.flat", int(float(millions) * 1e6 * share), seed)
            flats[name] = np.asarray(np.memmap(folder / f"{name}.flat", np.uint16, "r"))  # slicing a memmap is slow
        for seq_len in SEQ_LENS:
            others: dict[str, Side] = {}
            if THEIR_PYTHON.exists():
                for name, flat in flats.items():
                    cut(flat, seq_len, folder / f"cut{seq_len}" / name)
                others["mosaicml"] = start_theirs(shards, temporary)
                others["mosaicml_by_sequence"] = start_theirs(folder / f"cut{seq_len}", temporary)
            try:
                results[f"seq{seq_len}"] = measure(shards, flats, seq_len, others)
            finally:
                for side in others.values():
                    side.close()
        results["quickstart"] = beside_training(results["seq512"])
        num_ids, num_shards = sum(map(len, flats.values())), len(list(shards.rglob("*.mds")))
    results["data"] = f"{num_ids:,} ids of {len(flats)} sources, in {num_shards} shards"
    results["mosaicml"] = "0.13.0" if THEIR_PYTHON.exists() else "not run: make interop builds .interop"
    results["machine"] = machine("uint16 ids")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    for name, figures in results.items():
        print(name, *([f"{k} {v}" for k, v in figures.items()] if isinstance(figures, dict) else [figures]), sep="\n  ")


if __name__ == "__main__":
    main(*sys.argv[1:])
