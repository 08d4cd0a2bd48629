"""Trainings in children that can be killed: the product's own `run`, forked from a process that has imported it, so
that a child trains a few milliseconds after it was started.
"""

import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import SERVER
from network import Network, enter

from gristmill import artifact
from gristmill.train.log import read_metrics


def child(recipe: str, overrides: Sequence[str], out: str, environment: dict[str, str], log: str, host: str) -> None:
    """Run a recipe up to its trained model, on one of a network's hosts if named; exits as the command line does."""
    sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115 (the process ends with it)
    if host:
        enter(host)
    faulthandler.register(signal.SIGUSR1)  # `wait` asks one that does not end where it is
    os.environ |= environment
    from gristmill.cli.exits import exit_code
    from gristmill.pipeline import run
    from gristmill.progress import console
    from gristmill.recipe import load_recipe

    console.file = sys.stderr

    def call() -> int:
        run(load_recipe(recipe, overrides), Path(out), "train")
        return 0

    code = exit_code(call)
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may wait for a rank that is gone


@dataclass
class Run:
    """One run folder, trained again and again until it is done."""

    recipe: Path
    out: Path
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    network: Network | None = None

    def start(self) -> list[BaseProcess]:
        """A process for each rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = []
        for rank in range(self.ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1"}
            environment = {name: str(value) for name, value in place.items()} | {"MASTER_PORT": port}
            log = str(self.out.with_name(f"{self.out.name}.{rank}.log"))
            host = ""
            if self.network:
                host = self.network.hosts[rank]
                environment |= {"MASTER_ADDR": self.network.address, "GLOO_SOCKET_IFNAME": self.network.interface}
            args = (str(self.recipe), self.overrides, str(self.out), environment, log, host)
            started.append(SERVER.Process(target=child, args=args, daemon=True))
        for process in started:
            process.start()
        return started

    def finish(self, timeout_s: float = 120) -> list[int | None]:
        """Train to the end; the exit codes of the ranks."""
        return wait(self.start(), timeout_s)

    def said(self, rank: int = 0) -> str:
        """Everything that a rank has printed, over all its lives."""
        file = self.out.with_name(f"{self.out.name}.{rank}.log")
        return file.read_text() if file.exists() else ""

    @property
    def training(self) -> Path:
        (folder,) = self.out.glob("train/*")
        return folder

    def committed(self) -> list[int]:
        """Steps of the checkpoints that stand, ascending."""
        return sorted(int(file.parent.name[5:]) for file in self.out.glob("train/*/step-*/manifest.json"))

    def is_saving(self) -> bool:
        """A checkpoint's directory is there and its manifest is not."""
        return any(not (path / artifact.MANIFEST).exists() for path in self.out.glob("train/*/step-*"))

    def content(self) -> str:
        """The hash of the last checkpoint's bytes."""
        return artifact.load(self.training / f"step-{self.committed()[-1]:08d}").content

    def curve(self) -> list[dict[str, Any]]:
        """Every figure of every step, without those that a clock made."""
        clocks = {"seconds", "tokens_per_second", "gemm_tflops", "mfu_measured", "mfu_data_sheet"}
        records = [json.loads(line) for line in (self.training / "metrics.jsonl").read_text().splitlines()]
        kept = [r for r in records if r["kind"] in ("train", "validation")]
        return [{name: value for name, value in r.items() if name not in clocks} for r in kept]

    def validated(self) -> list[int]:
        """Steps with a validation record, in the order of the file."""
        file = next(self.out.glob("train/*/metrics.jsonl"), None)
        records = read_metrics(file) if file else []
        return [record["step"] for record in records if record["kind"] == "validation"]

    def last_logged(self) -> int:
        try:
            lines = (self.training / "metrics.jsonl").read_text().splitlines()
        except (OSError, ValueError):
            return 0
        steps = [0]
        for line in lines:
            try:
                steps.append(json.loads(line)["step"])
            except ValueError:
                continue  # half a line: it was killed while writing
        return max(steps)


def wait(processes: Sequence[BaseProcess], timeout_s: float = 120) -> list[int | None]:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGUSR1)
            process.join(0.5)
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def copied(prepared: Path, out: Path) -> Path:
    """A run folder with a corpus, a tokenizer and shards, ready to be trained in."""
    shutil.copytree(prepared, out, symlinks=True)
    return out
