"""What it costs that no batch changes a bit: the engine with fixed pieces and with any rows, in turn.

    python benchmarks/engine.py [tiny]

Greedy decoding of one and of eight sequences after prompts of 64, and one prompt of 500, each new; random weights, in
bf16 and fp32; medians of several rounds in which the two take turns, and the ratio of each round. Beside each, the
check: with fixed pieces a sequence's text and log-probabilities are the same bits alone and among eight. Results to
results/engine.json; `tiny` only shows that everything runs, and keeps none.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gristmill.inference import Engine, EngineConfig, Request
from gristmill.inference.requests import Token
from gristmill.inference.sampler import Sampling
from gristmill.model import ModelConfig, Transformer
from gristmill.train.machine import describe_machine

RESULTS = Path(__file__).with_name("results") / "engine.json"
FULL = ModelConfig(
    d_model=1024, n_layers=8, n_heads=16, kv_n_heads=4, ffn_hidden_size=1152, moe_num_experts=16, moe_top_k=4,
    vocab_size=32768, max_seq_len=1024,
)  # fmt: skip
TINY = ModelConfig(
    d_model=64, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2,
    vocab_size=256, max_seq_len=1024,
)  # fmt: skip
GREEDY = Sampling(temperature=0.0)


def answers(engine: Engine, prompts: list[list[int]], new: int) -> tuple[list[list[Token]], float]:
    """Each prompt's tokens, and the seconds of the steps after the first, which takes the prompts."""
    streams = [engine.submit(Request(prompt=p, max_tokens=new, sampling=GREEDY, logprobs=0)) for p in prompts]
    engine.step()
    started = time.perf_counter()
    while engine.step():
        pass
    seconds = time.perf_counter() - started
    return [[token for piece in stream.take() for token in piece.tokens] for stream in streams], seconds


def measure(cfg: ModelConfig, dtype: torch.dtype, rounds: int, new: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Transformer(cfg, dtype).to(dtype)
    ways = {"fixed": True, "any": False}
    rates: dict[str, dict[str, list[float]]] = {}
    same = True
    for number in range(-1, rounds):  # the first warms up
        chance = torch.Generator().manual_seed(number + 1)
        prompts = torch.randint(cfg.vocab_size or 0, (8, 64), generator=chance).tolist()
        (long,) = torch.randint(cfg.vocab_size or 0, (1, 500), generator=chance).tolist()
        for way, invariant in ways.items():
            engines = [Engine(model, EngineConfig(batch_invariant=invariant)) for _ in range(3)]
            (alone,), one = answers(engines[0], prompts[:1], new)
            together, eight = answers(engines[1], prompts, new)
            same = same and (not invariant or alone == together[0])
            started = time.perf_counter()
            answers(engines[2], [long], 1)
            prompt = time.perf_counter() - started
            if number >= 0:
                figures = {"decode_1": (new - 1) / one, "decode_8": 8 * (new - 1) / eight, "prompt_500": 500 / prompt}
                for name, rate in figures.items():
                    rates.setdefault(name, {}).setdefault(way, []).append(rate)
    found: dict[str, Any] = {"same_bits_alone_and_among_eight": same}
    for name, by in rates.items():
        ratio = statistics.median(a / b for a, b in zip(by["fixed"], by["any"], strict=True))
        found[name] = {way: round(statistics.median(each), 1) for way, each in by.items()} | {"ratio": round(ratio, 3)}
    return found


def main() -> None:
    tiny = "tiny" in sys.argv[1:]
    load = os.getloadavg()[0]
    results: dict[str, Any] = {"machine": describe_machine() | {"threads": torch.get_num_threads(), "load": load}}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        results[name] = measure(TINY if tiny else FULL, dtype, rounds=2 if tiny else 5, new=4 if tiny else 48)
        print(name, json.dumps(results[name]), flush=True)
    if not tiny:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
