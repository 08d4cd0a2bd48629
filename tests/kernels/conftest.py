"""Every way in which a CPU can compute a kernel. `make sanitize` puts another build in the installed one's place."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gristmill.kernels import native

ROOT = Path(__file__).parents[2]
look_for_library = native._library  # before `make sanitize` puts another there


@pytest.fixture(scope="session", autouse=True)
def library_under_test() -> None:
    if path := os.environ.get("GRISTMILL_TEST_LIBRARY"):
        library = ctypes.CDLL(path)
        native._library = lambda: library  # type: ignore[assignment]


def not_run(why: str) -> None:
    """Skips, or fails where the environment says that native kernels must be there."""
    if "native" in os.environ.get("GRISTMILL_REQUIRE", "").split(","):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The code for AMX over tiles in plain C++."""
    if (compiler := shutil.which(os.environ.get("CXX", "g++"))) is None:
        not_run("no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = "-std=c++17 -O1 -fPIC -fopenmp -fno-math-errno -Wno-psabi -shared -DEMULATE_AMX -DISA=amx_bf16"
    sources = [str(ROOT / "src/gristmill/kernels/native" / name) for name in ("kernels.cpp", "team.cpp")]
    subprocess.run([str(compiler), *flags.split(), *sources, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=[*native.ISAS, "emulated AMX", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of computing on a CPU, one after the other; a way that is not here is reported."""
    name = request.param
    if name == "emulated AMX":
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(native, "_library", lambda: library)
        monkeypatch.setattr(native, "_in_use", "amx_bf16")
    elif name in native.available():
        monkeypatch.setattr(native, "_in_use", name)
    elif name == "plain":
        not_run("the native kernels were not built")
    else:
        pytest.skip(f"this CPU has no {name}")
    return str(name)


@pytest.fixture
def built() -> None:
    """For tests of a library that must be there."""
    if native.available() == ["torch"]:
        not_run("the native kernels were not built")


@pytest.fixture
def opened_anew() -> Callable[[], ctypes.CDLL | None]:
    """Looks for the installed library as a new process would."""
    return look_for_library.__wrapped__
