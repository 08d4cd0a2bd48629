"""Training, prefill and decode next to busy processes and under a CPU quota, compared with transformers and llama.cpp.

    python benchmarks/neighbors.py [train] [decode] [prefill]      all of them by default
    python benchmarks/neighbors.py --ours [...]                    without transformers and llama.cpp
    python benchmarks/neighbors.py --against CHECKOUT [...]        quiet only: ten pairs with another checkout

On two CPUs next to n busy processes, a fair share is 2 / (n + 2) of the quiet rate. Each side is a process of its own;
they take turns, and the others sleep meanwhile. A rate is all tokens over all seconds of a condition, since the slow
moments count. llama.cpp takes part in decode if `make bench-inference` has built it. A quota needs a cgroup that this
user may create; without one the row says "not run". Results go to results/neighbors.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from inference import PEERS, THREADS, fresh, llamacpps_of, ours_of
from training import QUICKSTART, Shape, Side, machine, route_as_trained

from gristmill.hub import in_memory, write_published
from gristmill.kernels import native
from gristmill.model import Transformer, init_weights

CHECKOUT = Path(__file__).parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results" / "neighbors.json"
TRAIN = Shape(QUICKSTART)
# The same size in a layout that llama.cpp runs.
SERVED = replace(QUICKSTART, norm="rms_norm", norm_eps=1e-6, qk_norm=True, clip_qkv=None)
SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
SIDES = {"ours": "gristmill", "transformers": "transformers"}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
BUSY = [sys.executable, "-S", "-c", "while True: pass"]
NEIGHBORS = (0, 1, 2, 3, 5)
QUOTA_CPUS = 1.5
PAUSE_S = 0.05  # after a turn: idle threads of this side stop spinning
MUSTS = {
    "train": {1: 0.85, 2: 0.85, 3: 0.85, 5: 0.85},
    "decode": {1: 0.5, 2: 0.35},
}  # of the fair share; of the quiet rate


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    busy = [subprocess.Popen(BUSY) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def quota(sides: list[Side]) -> Iterator[bool]:
    """Limits the sides to QUOTA_CPUS; yields whether that was possible."""
    v1 = Path("/sys/fs/cgroup/cpu")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"gristmill-benchmark-{os.getpid()}"
    period = 100_000
    try:
        group.mkdir()
    except OSError:
        yield False
        return
    try:
        if v1.is_dir():
            (group / "cpu.cfs_quota_us").write_text(str(int(QUOTA_CPUS * period)))
        else:
            (group / "cpu.max").write_text(f"{int(QUOTA_CPUS * period)} {period}")
        for side in sides:
            (group / "cgroup.procs").write_text(str(side.process.pid))
        yield True
    except OSError:
        yield False
    finally:
        for side in sides:
            (group.parent / "cgroup.procs").write_text(str(side.process.pid))
        time.sleep(0.1)
        group.rmdir()


def waiting(env: dict[str, str], checkout: Path) -> dict[str, str]:
    """Return a side's environment: `env` replaces the user's wait variables, and the package is that of `checkout`."""
    os_env = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    return os_env | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(checkout / "src")} | env


class Trainer:
    """Steps of the quickstart's shape."""

    def __init__(self, folder: Path, name: str, env: dict[str, str], checkout: Path = CHECKOUT) -> None:
        worker = checkout / "benchmarks" / "training_worker.py"
        tokens = str(TRAIN.batch), str(TRAIN.model.max_seq_len), TRAIN.dtype
        self.side = Side([str(worker), name, str(folder), *tokens], waiting(env, checkout))
        self.tokens = TRAIN.batch * TRAIN.model.max_seq_len

    def turn(self, seed: int) -> tuple[int, float]:
        """Tokens and seconds."""
        return self.tokens, self.side.ask(str(seed))["seconds"]


class Generator:
    """Greedy tokens after a short prompt, or the first token after a long one."""

    def __init__(self, name: str, prompt: int, new: int, env: dict[str, str], checkout: Path = CHECKOUT) -> None:
        worker = checkout / "benchmarks" / "inference_worker.py"
        python = str(PEERS / "bin" / "python") if name == "llamacpp" else sys.executable
        model = llamacpps_of(SERVED, "bf16") if name == "llamacpp" else ours_of(SERVED, "bf16")
        self.side = Side([str(worker), name, str(model)], waiting(env, checkout), python)
        self.prompt, self.new = prompt, new

    def turn(self, seed: int) -> tuple[int, float]:
        answer = self.side.ask(json.dumps({"prompts": fresh(SERVED, 1, self.prompt, seed), "new": self.new}))
        return (self.prompt, answer["first"]) if self.new == 1 else (self.new - 1, answer["rest"])


def sides_of(kind: str, folder: Path, with_peers: bool) -> dict[str, Any]:
    match kind:
        case "train":
            policies = {"": {}, ", sleeping": SLEEP}
            names = SIDES if with_peers else ["ours"]
            pairs = ((f"{name}{policy}", name, env) for name in names for policy, env in policies.items())
            return {name: Trainer(folder, SIDES[side], env) for name, side, env in pairs}
        case "prefill":
            return {"ours": Generator("gristmill", 500, 1, {})}
        case _:
            ours = {"ours": Generator("gristmill", 8, 200, {})}
            has_peer = with_peers and (PEERS / "built").exists()
            return ours | ({"llama.cpp": Generator("llamacpp", 8, 200, {})} if has_peer else {})


def rates(sides: dict[str, Any], turns: int, seed: int) -> dict[str, int]:
    """Tokens per second of each side over all of its turns."""
    totals = {name: [0.0, 0.0] for name in sides}
    for turn in range(turns):
        for name, side in sides.items():
            tokens, seconds = side.turn(seed + turn)
            totals[name][0] += tokens
            totals[name][1] += seconds
            time.sleep(PAUSE_S)
    return {name: round(tokens / seconds) for name, (tokens, seconds) in totals.items()}


def measure(kind: str, folder: Path, turns: int, with_peers: bool) -> dict[str, Any]:
    sides = sides_of(kind, folder, with_peers)
    try:
        rates(sides, 3, 0)  # warm up
        rows: dict[str, Any] = {}
        for count in NEIGHBORS:
            with neighbors(count):
                rates(
                    sides, 1, 1000 * (count + 1) + 500
                )  # a training notices its neighbors by the time that a step got
                rows[f"{count} busy"] = rates(sides, turns, 1000 * (count + 1))
        with quota([side.side for side in sides.values()]) as is_limited:
            rows[f"quota of {QUOTA_CPUS} CPUs"] = rates(sides, turns, 900) if is_limited else "not run"
    finally:
        for side in sides.values():
            side.side.close()
    quiet = rows["0 busy"]["ours"]
    for count, must in MUSTS.get(kind, {}).items():
        share = rows[f"{count} busy"]["ours"] / quiet
        reached = share / (2 / (count + 2)) if kind == "train" else share
        rows[f"{count} busy"]["reached"], rows[f"{count} busy"]["must"] = round(reached, 2), must
    return rows | {"machine": machine(TRAIN.dtype), "kernels": native.in_use()}


def compare(kind: str, folder: Path, checkout: Path, pairs: int = 10) -> dict[str, Any]:
    """Return the median ratio of this checkout's rate to the other's, pair by pair, on a quiet machine."""
    match kind:
        case "train":
            ours, before = Trainer(folder, "gristmill", {}), Trainer(folder, "gristmill", {}, checkout)
        case "prefill":
            ours, before = Generator("gristmill", 500, 1, {}), Generator("gristmill", 500, 1, {}, checkout)
        case _:
            ours, before = Generator("gristmill", 8, 200, {}), Generator("gristmill", 8, 200, {}, checkout)
    ratios = []
    try:
        for turn in range(-3, pairs):
            both = [ours, before] if turn % 2 else [before, ours]
            took = {}
            for side in both:
                took[side] = rates({"": side}, 1 if kind == "train" else 5, 10 * turn + 50)[""]
            if turn >= 0:
                ratios.append(took[ours] / took[before])
    finally:
        ours.side.close()
        before.side.close()
    quarters = statistics.quantiles(ratios, n=4)
    return {"ratio": round(statistics.median(ratios), 3), "quartiles": [round(quarters[0], 3), round(quarters[2], 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["train", "prefill", "decode"])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, with its kernels built")
    parser.add_argument("--ours", action="store_true", help="leave transformers and llama.cpp out")
    parser.add_argument("--turns", type=int, default=3, help="turns of each side in each condition")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        model = init_weights(Transformer(TRAIN.model), seed=0)
        route_as_trained(model, 0.0)
        write_published(Path(temporary), TRAIN.model, in_memory(model.state_dict()), None)
        for kind in args.kinds:
            name = f"{kind}_against_before" if args.against else kind
            if args.against:
                found = compare(kind, Path(temporary), args.against.resolve()) | {"machine": machine(TRAIN.dtype)}
            else:
                found = measure(kind, Path(temporary), args.turns, not args.ours)
            results[name] = found
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            print(name, *(f"{key}: {value}" for key, value in found.items()), sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
