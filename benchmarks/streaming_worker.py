"""MosaicML Streaming's side of `streaming.py`, run by .interop/bin/python: reads batches for each line that it is sent.

    python benchmarks/streaming_worker.py SHARDS WEIGHTS       SHARDS: a folder of sources. WEIGHTS: {"code": 3, ...}

A line on standard input is "SEQ_LEN SEQUENCES BATCHES"; a line of JSON comes back. The dataset shuffles samples; the
windows of one follow each other.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from streaming import Stream, StreamingDataset


def blocks(dataset: StreamingDataset) -> Iterator[np.ndarray]:
    while True:
        yield from (sample["tokens"] for sample in dataset)


def batches(tokens: Iterator[np.ndarray], seq_len: int, sequences: int) -> Iterator[np.ndarray]:
    ids, row = np.empty((sequences, seq_len + 1), np.int64), 0
    for block in tokens:
        for first in range(0, len(block) - 1, seq_len):
            ids[row] = block[first : first + seq_len + 1]
            row += 1
            if row == sequences:
                yield ids
                ids, row = np.empty((sequences, seq_len + 1), np.int64), 0


def main(shards: str, weights: str) -> None:
    streams = [
        Stream(local=str(Path(shards) / name), proportion=weight) for name, weight in json.loads(weights).items()
    ]
    dataset = StreamingDataset(streams=streams, shuffle=True, batch_size=16)
    tokens = blocks(dataset)
    for line in sys.stdin:
        seq_len, sequences, count = map(int, line.split())
        source = batches(tokens, seq_len, sequences)
        started = time.perf_counter()
        for _ in range(count):
            next(source)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
