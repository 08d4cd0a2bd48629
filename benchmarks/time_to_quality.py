"""Time to the held-out loss that transformers' training reaches in eight minutes.

    python benchmarks/time_to_quality.py [WORK] [--minutes 8]

Theirs: DbrxForCausalLM with bf16 weights and torch's AdamW on the quickstart's model size, data, batch and order, from
the same initial weights; warm-up, then a cosine to zero at the end of the time; the best of three learning rates. Ours:
trainings planned for a quarter and an eighth of the time, each with its own schedule that ends there. So the optimizer,
the batch and the precision of the weights differ on purpose: it compares what each gives its user, not its kernels,
which training.py does. One function scores all of the validation split for both; ours was tuned on it, theirs in its
rate. See quality_worker.py for how minutes become steps.

An unfinished comparison goes on in WORK (default runs/time_to_quality). Results go to results/time_to_quality.json, a
trial's with other minutes to WORK.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from quality_worker import Variant, calibrate, prepare, trained
from training import machine

from gristmill.progress import console
from gristmill.train.machine import best_dtype

MINUTES = 8.0
ROUNDS = 15
RESULTS = Path(__file__).with_name("results") / "time_to_quality.json"
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
THEIRS = Variant(
    "transformers",
    (
        "train.optimizer={name: adamw, beta1: 0.9, beta2: 0.95, clip_norm: 1.0}",
        "train.schedule={name: cosine, warmup: 0.05, final: 0}",
    ),
)
# The share of the time that a training is planned for, and its settings: so short a training gains more from twice as
# many steps than from steady gradients.
SMALL_BATCH = Variant("gristmill", ("train.batch_tokens=4096", "train.micro_batch=8"))
OURS = {4: SMALL_BATCH, 8: SMALL_BATCH}


def steps_in(seconds: float, step_seconds: float) -> str:
    return f"train.steps={max(1, round(seconds / step_seconds))}"


def compare(work: Path, minutes: float) -> dict[str, Any]:
    prepare(work)
    ours = {f"ours_1/{share}": variant for share, variant in OURS.items()}
    calibration = calibrate(work, {"theirs": THEIRS} | ours, ROUNDS)
    step_seconds = calibration["step_seconds"]
    theirs = THEIRS.having(steps_in(minutes * 60, step_seconds["theirs"]))
    runs = {
        f"theirs lr {lr:g}": trained(work, f"theirs-{lr:g}", theirs.having(f"train.optimizer.lr={lr}"), "validation")
        for lr in LEARNING_RATES
    }
    goal = min(run["bits_per_byte"] for run in runs.values())
    reached: list[float] = []
    for share, variant in OURS.items():
        name = f"ours_1/{share}"
        seconds = minutes * 60 / share
        # Theirs is timed beside it, so a change of the machine's speed between the steps of one round hits neither.
        planned = variant.having(steps_in(seconds, step_seconds["theirs"] / calibration["speed"][name]))
        runs[name] = trained(work, f"ours-{share}", planned, "validation")
        if runs[name]["bits_per_byte"] <= goal:
            reached.append(minutes / share)
    best = min(reached, default=None)
    return {
        "theirs_minutes": minutes,
        "ours_minutes": best,
        "ratio": minutes / best if best else None,
        "bits_per_byte": {name: round(run["bits_per_byte"], 4) for name, run in runs.items()},
        "learning_rates": LEARNING_RATES,
        "steps": {name: run["steps"] for name, run in runs.items()},
        "tokens": {name: run["tokens"] for name, run in runs.items()},
        "calibration": calibration,
        "machine": machine(str(best_dtype()).removeprefix("torch.")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", type=Path, default=Path("runs/time_to_quality"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    args = parser.parse_args()
    results = compare(args.work, args.minutes)
    file = RESULTS if args.minutes == MINUTES else args.work / RESULTS.name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    console.print_json(data=results)


if __name__ == "__main__":
    main()
