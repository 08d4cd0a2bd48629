"""What it costs to draw a token, beside sorting the whole vocabulary for it: python benchmarks/sampling.py

Random logits of three vocabularies, drawn in both ways in turn, which must give the same token; medians of 30 draws.
"""

import time
from statistics import median

import torch
from torch import Tensor

from gristmill.inference.sampler import Sampling, pick

DRAWS = 30
WAYS = {
    "temperature 1": Sampling(),
    "top-k 50": Sampling(top_k=50),
    "top-p 0.9": Sampling(top_p=0.9),
    "min-p 0.1": Sampling(min_p=0.1),
}


def sorted_pick(logits_V: Tensor, sampling: Sampling, chance: float) -> int:
    """By a stable sort of all logits."""
    order = logits_V.double().sort(descending=True, stable=True)
    values = order.values if sampling.top_k is None else order.values[: sampling.top_k]
    probs = (values / sampling.temperature).softmax(0)
    probs = probs[(probs.cumsum(0) - probs < sampling.top_p) & (probs >= sampling.min_p * probs[0])]
    index = int((probs.cumsum(0) / probs.sum() <= chance).sum())
    return int(order.indices[min(index, len(probs) - 1)])


def main() -> None:
    torch.set_num_threads(2)
    for V in (32_768, 100_352, 151_936):
        for name, sampling in WAYS.items():
            times: dict[str, list[float]] = {"all sorted": [], "as needed": []}
            for seed in range(DRAWS):
                generator = torch.Generator().manual_seed(seed)
                logits_V, chance = torch.randn(V, generator=generator) * 3, float(torch.rand(1, generator=generator))
                ids = []
                for way, draw in (("all sorted", sorted_pick), ("as needed", pick)):
                    begun = time.perf_counter()
                    ids.append(draw(logits_V, sampling, chance))
                    times[way].append(time.perf_counter() - begun)
                assert ids[0] == ids[1]
            print(f"{V:8,} {name:14}", *(f"{way} {median(taken) * 1e3:6.2f} ms " for way, taken in times.items()))


if __name__ == "__main__":
    main()
