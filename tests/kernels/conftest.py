"""`make sanitize` puts another build of the native kernels in the installed one's place."""

import ctypes
import os

import pytest

from gristmill.kernels import native


@pytest.fixture(scope="session", autouse=True)
def library_under_test() -> None:
    if path := os.environ.get("GRISTMILL_TEST_LIBRARY"):
        library = ctypes.CDLL(path)
        native._library = lambda: library  # type: ignore[assignment]
