"""A file system without locks is one clear failure wherever a lock is taken."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill import artifact
from gristmill.errors import Failure
from gristmill.hub.pull import _locked as locked_pull
from gristmill.session import locked
from gristmill.streaming.cache import Cache
from gristmill.streaming.config import Remote


def building(path: Path) -> Any:
    return artifact.building(path / "out", 1)


def cache(path: Path) -> Any:
    return Cache(Remote(url="https://host/shards", cache=str(path / "cache"))).locked()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("take", [locked, building, cache, locked_pull])
def test_a_file_system_without_locks_is_named_with_a_way_out(
    take: Callable[[Path], Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_file: object, _how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Failure, match=r"has no file locks; mount it with .*, or choose a folder on another") as failed:
        take(tmp_path).__enter__()
    assert "\n" not in str(failed.value)
    assert not list(tmp_path.glob(".*.partial"))


def test_a_cache_that_another_process_begins_to_use_meanwhile_is_not_taken_for_somebody_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def iterdir(path: Path) -> Any:
        (path / "shards.lock").touch()
        (path / "0123456789abcdef").mkdir()
        return listed(path)

    listed = Path.iterdir
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(Path, "iterdir", iterdir)
    Cache(Remote(url="https://host/shards", cache=str(tmp_path / "cache")))
