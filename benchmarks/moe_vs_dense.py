"""A fine-grained mixture beside a coarser and a dense model: the quickstart's training, three seeds each.

    python benchmarks/moe_vs_dense.py [WORK] [--minutes 7]

16 experts choose 4 (the quickstart), 8 choose 2 of twice the width (the same active and total parameters), and a dense
model of the same active parameters, all after as many tokens as the first one reads in seven minutes; then the dense
one after as much time instead, so as many more steps as its step is faster. Data, order, optimizer and schedule are the
same; bits per byte of the whole test split at the end. See quality_worker.py for how minutes become steps.

It takes about 80 minutes. Finished trainings are kept in WORK (default runs/moe_vs_dense), an unfinished one goes on
from its checkpoint. Results go to results/moe_vs_dense.json, a trial's with other minutes to WORK.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from quality_worker import Variant, calibrate, prepare, trained
from training import machine

from gristmill.model.counts import count_params
from gristmill.progress import console
from gristmill.train.machine import best_dtype

MINUTES = 7.0
ROUNDS = 15
SEEDS = (0, 1, 2)
RESULTS = Path(__file__).with_name("results") / "moe_vs_dense.json"
MOE = Variant("gristmill")
VARIANTS = {
    "moe": MOE,
    "moe_8c2": MOE.having("model.moe_num_experts=8", "model.moe_top_k=2", "model.ffn_hidden_size=256"),
    "dense": MOE.having("model.ffn=dense", "model.ffn_hidden_size=512"),
}


def compare(work: Path, minutes: float) -> dict[str, Any]:
    prepare(work)
    calibration = calibrate(work, VARIANTS, ROUNDS)
    equal_tokens = max(1, round(minutes * 60 / calibration["step_seconds"]["moe"]))
    equal_wall = max(1, round(equal_tokens * calibration["speed"]["dense"]))
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in SEEDS:  # the outer loop, so that what stands after a part of the time compares all of them
        for name, variant in VARIANTS.items():
            for kind, steps in {"tokens": equal_tokens, "wall": equal_wall}.items():
                if kind == "tokens" or name == "dense":
                    planned = variant.having(f"train.steps={steps}", f"train.seed={seed}")
                    run = trained(work, f"{name}-{kind}-{seed}", planned, "test")
                    runs.setdefault(f"{kind} {name}", []).append(run)
    bits = {name: [round(run["bits_per_byte"], 4) for run in its] for name, its in runs.items()}
    counts = {name: count_params(variant.recipe()["model"]) for name, variant in VARIANTS.items()}
    return {
        "tokens": {name: bits[f"tokens {name}"] for name in VARIANTS},
        "wall": {"moe": bits["tokens moe"], "dense": bits["wall dense"]},
        "minutes": minutes,
        "steps": {"tokens": equal_tokens, "wall": {"moe": equal_tokens, "dense": equal_wall}},
        "active_params": {name: count.active_params for name, count in counts.items()},
        "total_params": {name: count.total_params for name, count in counts.items()},
        "calibration": calibration,
        "machine": machine(str(best_dtype()).removeprefix("torch.")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", type=Path, default=Path("runs/moe_vs_dense"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    args = parser.parse_args()
    results = compare(args.work, args.minutes)
    file = RESULTS if args.minutes == MINUTES else args.work / RESULTS.name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    console.print_json(data=results)


if __name__ == "__main__":
    main()
