"""Shared by all tests: eager kernels on one thread (quick to start, the same everywhere), and a tiny run to look at."""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from ranks import Processes
from texts import TINY, write_texts

from gristmill.recipe import load_recipe
from gristmill.stage import Recipe

settings.register_profile("default", deadline=None)
settings.register_profile("stress", deadline=None, max_examples=2000)
settings.load_profile("default")


@pytest.hookimpl(optionalhook=True)  # there is no such hook under `-p no:xdist`
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two for the whole suite, which waits for children a third of its time; what is named runs in this process."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two ranks, which serve all tests that ask for them."""
    processes = Processes(2, tmp_path_factory.mktemp("two"))
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(4, tmp_path_factory.mktemp("four"))
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file that runs from text to export in seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    notes, verse = write_texts(folder / "notes", 1), write_texts(folder / "verse", 2)
    file = folder / "tiny.yaml"
    file.write_text(TINY.format(notes=notes, verse=verse))
    return file


@pytest.fixture(scope="session")
def tiny_recipe(tiny_yaml: Path) -> Callable[..., Recipe]:
    return lambda *overrides: load_recipe(str(tiny_yaml), overrides)


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe; tests only read it."""
    from gristmill.pipeline import run

    torch.set_num_threads(1)
    return run(tiny_recipe(), tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def llama_cpp() -> ModuleType:
    try:
        return import_module("llama_cpp")
    except ImportError as problem:
        if "llama.cpp" in os.environ.get("GRISTMILL_REQUIRE", ""):
            pytest.fail(f"GRISTMILL_REQUIRE names llama.cpp, and llama-cpp-python cannot be imported: {problem}")
        pytest.skip("not run: llama-cpp-python is not installed")
