"""Runs a function on several gloo processes, which start once, and starts single ones within milliseconds.

Both are forked from a server that has imported what they need and runs no threads.
"""

import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import SERVER

from gristmill.parallel.ranks import Ranks


class Processes:
    """`world_size` ranks that wait for functions to run."""

    def __init__(self, world_size: int, folder: Path) -> None:
        pipes = [SERVER.Pipe() for _ in range(world_size)]
        self.ends = [ours for ours, _ in pipes]
        self.processes = [
            SERVER.Process(target=_serve, args=(Ranks(rank, world_size), folder / "store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(ranks, *args)` returned on each rank."""
        for end in self.ends:
            end.send((function, args))
        answers = [end.recv() for end in self.ends]
        assert all(done for done, _ in answers), "\n".join(str(answer) for done, answer in answers if not done)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for end, process in zip(self.ends, self.processes, strict=True):
            end.send(None)
            process.join()


def _serve(ranks: Ranks, store: Path, end: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=ranks.rank, world_size=ranks.world_size)
    ranks = replace(ranks, store=dist.FileStore(f"{store}-of-turns", ranks.world_size))
    while job := end.recv():
        function, args = job
        try:
            end.send((True, function(ranks, *args)))
        except BaseException:
            end.send((False, f"rank {ranks.rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()
