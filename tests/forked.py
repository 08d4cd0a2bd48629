"""Processes that start within milliseconds: forked from one server that has imported everything and runs no threads."""

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")  # there is one for all tests, so what it imports is said once
SERVER.set_forkserver_preload(
    ["gristmill.cli", "gristmill.pipeline", "torch.distributed.tensor", "fsspec.implementations.http", "hypothesis"]
)
