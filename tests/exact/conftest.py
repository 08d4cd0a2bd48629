"""How many random models (GRISTMILL_EXACT for each layout), and the figures that a longer run prints at its end."""

import os
from collections.abc import Iterator

import both
import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def quiet_reference_on_one_thread() -> Iterator[None]:
    """For the whole module, because its fixtures compute too, before those of a single test."""
    torch.set_num_threads(1)
    with both.quiet():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "GRISTMILL_EXACT" not in os.environ:
        return
    terminalreporter.section("exactness: largest figures, counts")
    for name, value in sorted(both.figures.items()):
        terminalreporter.line(f"{name:60} {value:.3g}")
    for name, count in sorted(both.counts.items()):
        terminalreporter.line(f"{name:60} {count}")
