"""Processes that start within milliseconds: forked from one server that has imported everything and runs no threads."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")  # there is one for all tests, so what it imports is said once
SERVER.set_forkserver_preload(
    ["gristmill.cli", "gristmill.pipeline", "torch.distributed.tensor", "fsspec.implementations.http", "hypothesis"]
)


def gristmill(*arguments: str | Path, timeout_s: float = 100) -> "subprocess.CompletedProcess[str]":
    """`gristmill ...` in a process of its own, which need not import torch first: how it ended and what it printed."""
    words = tuple(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        process = SERVER.Process(target=_gristmill, args=(words, folder))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout_s)
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _gristmill(words: tuple[str, ...], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    import torch

    from gristmill.cli import main

    torch.set_num_threads(1)
    sys.argv = ["gristmill", *words]
    main()
