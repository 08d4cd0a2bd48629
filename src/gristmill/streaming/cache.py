"""A bounded directory of downloaded shard files that all processes of a node share, through the file system alone.

CACHE/shards.lock        marks the directory as a cache; locked while room is made
CACHE/<URL's hash>/      one for each remote directory; `url` says which
    NAME.partial         being downloaded by whoever holds the lock on it; without a holder it counts for nothing
    NAME.shard           whole, verified and synced before it got this name; its mtime is its last use

The kernel drops a lock with its process, so a kill at any moment leaves nothing stale: a partial file without a holder
is overwritten or removed by the next who comes. A partial file has its full size from the start, so that sizes alone
say how much of the limit is spoken for. The last use is an mtime that we set: many mounts keep no access times, and
nobody needs to know when a copy was written.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from gristmill.artifact import write_atomically
from gristmill.errors import Failure, InputError
from gristmill.locks import lock, unlock
from gristmill.progress import console
from gristmill.streaming.config import Remote
from gristmill.streaming.index import damage, mapped
from gristmill.streaming.remote import download, join, require

LOCK = "shards.lock"
URL = "url"
PARTIAL, WHOLE = ".partial", ".shard"
ROOM_POLL_S = 0.05  # while other processes' downloads fill the whole cache


class Busy(Exception):
    """Another process or thread downloads this file, or all room is taken by downloads."""


class Cache:
    """The directory. Raises InputError where it cannot be one."""

    def __init__(self, remote: Remote) -> None:
        require("shards.remote", remote.url)
        self.url, self.root, self.limit_bytes = remote.url, remote.directory.resolve(), remote.cache_bytes
        if urlsplit(self.url).scheme in ("file", "local"):
            source = Path(urlsplit(self.url).path).resolve()
            if source.is_relative_to(self.root) or self.root.is_relative_to(source):
                raise InputError(f"shards.cache={self.root} overlaps the shards themselves ({source}); choose another")
        try:
            # In this order: another process that begins to use the directory creates the lock first.
            if any(self.root.iterdir()) and not (self.root / LOCK).exists():
                raise InputError(f"shards.cache={self.root} holds files of others; name a new or empty directory")
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            raise InputError(f"shards.cache={self.root} is or lies below a file; name a directory") from None

    def files(self, source: str) -> "ShardFiles":
        """Those of one source's directory."""
        return ShardFiles(self, join(self.url, source))

    def check_limit(self, largest: int) -> None:
        """Raises InputError when the largest shard file does not fit."""
        if largest > self.limit_bytes:
            raise InputError(
                f"shards.cache_bytes={self.limit_bytes} has no room for the largest shard of {self.url}; it must be at "
                f"least {largest}"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("a") as file:
            lock(file, self.root / LOCK, wait=True)
            yield

    def take_room(self, partial: BinaryIO, num_bytes: int) -> None:
        """Give a locked partial file its full size, for which the least recently used files go.

        Raises Busy when downloads have all room.
        """
        with self.locked():
            wholes, taken = self._contents()
            taken += sum(stat.st_size for _, stat in wholes)
            for file, stat in sorted(wholes, key=lambda entry: entry[1].st_mtime_ns):
                if taken + num_bytes <= self.limit_bytes:
                    break
                file.unlink(missing_ok=True)
                taken -= stat.st_size
            if taken + num_bytes > self.limit_bytes:
                raise Busy
            partial.truncate(num_bytes)

    def _contents(self) -> tuple[list[tuple[Path, os.stat_result]], int]:
        """The whole files of the cache's own directories, and the bytes of downloads. Clears what the dead left."""
        wholes, downloads = [], 0
        for marker in self.root.glob(f"*/{URL}"):
            if not marker.is_file() or marker.parent.name != _folder_name(marker.read_text(errors="replace").strip()):
                continue  # somebody else's
            for file in marker.parent.iterdir():
                with suppress(FileNotFoundError):  # renamed or removed meanwhile
                    if file.suffix == WHOLE:
                        wholes.append((file, file.lstat()))
                    elif file.suffix == PARTIAL and not _cleared(file):
                        downloads += file.lstat().st_size
        return wholes, downloads


class ShardFiles:
    """The shard files of one remote directory. `info`, everywhere: what an index says of a file.

    Raises Failure when a file cannot be had, OSError when the cache cannot be written.
    """

    def __init__(self, cache: Cache, url: str) -> None:
        self._cache, self._url = cache, url
        self._folder = cache.root / _folder_name(url)

    def map(self, info: Mapping[str, Any]) -> memoryview:
        """A file's bytes, checked; fetched when they are not here, and again, once, when they are damaged here."""
        for _ in range(2):
            with self._opened(info) as file:
                data, here = mapped(file), os.fstat(file.fileno())
            what = damage(info, data)
            if what is None:
                return data
            path = self._path(info, WHOLE)
            console.print(f"  {path} is damaged or old: {what}; fetching it again", style="red", markup=False)
            with self._cache.locked(), suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), here):  # else another process was faster
                    path.unlink()
        raise Failure(f"{path} was damaged twice ({what}): this disk does not keep what is written; set shards.cache")

    def holds(self, info: Mapping[str, Any]) -> bool:
        return self._path(info, WHOLE).exists()

    def touch(self, info: Mapping[str, Any]) -> bool:
        """Note that a file is used, or will be soon; False when it is not here."""
        try:
            os.utime(self._path(info, WHOLE))
        except FileNotFoundError:
            return False
        return True

    def fetch_ahead(self, info: Mapping[str, Any]) -> None:
        """One quiet attempt. Raises Busy, Failure or OSError."""
        self._opened(info, patient=False).close()

    def _opened(self, info: Mapping[str, Any], patient: bool = True) -> BinaryIO:
        """The file, open: whoever evicts it takes only its name away."""
        while True:
            if self.touch(info):
                with suppress(FileNotFoundError):
                    return self._path(info, WHOLE).open("rb")
            if file := self._fetched(info, patient):
                return file

    def _fetched(self, info: Mapping[str, Any], patient: bool) -> BinaryIO | None:
        """Download a file; None when another was faster and it may be there now."""
        self._make_folder()
        path = self._path(info, PARTIAL)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            _lock(file, path, patient)
            try:
                if self.holds(info) or not _is_at(path, file):
                    return None
                self._fill(file, info, patient)
                with self._cache.locked():  # or whoever adds up sizes could miss it between its two names
                    path.replace(self._path(info, WHOLE))
                return os.fdopen(os.dup(file.fileno()), "rb")
            finally:
                if _is_at(path, file):  # not renamed
                    path.unlink()
                unlock(file)

    def _fill(self, file: BinaryIO, info: Mapping[str, Any], patient: bool) -> None:
        """Bring all of a locked partial file's bytes here, and onto the disk."""
        file.truncate(0)  # what a killed process left
        self._reserve(file, info["bytes"], patient)
        url = join(self._url, *info["basename"].split("/"))
        download(url, file, info["bytes"], lambda: damage(info, mapped(file)), patient)
        os.fsync(file.fileno())

    def _reserve(self, file: BinaryIO, num_bytes: int, patient: bool) -> None:
        self._cache.check_limit(num_bytes)
        while True:
            try:
                return self._cache.take_room(file, num_bytes)
            except Busy:
                if not patient:
                    raise
            time.sleep(ROOM_POLL_S)

    def _make_folder(self) -> None:
        if not (self._folder / URL).exists():
            with self._cache.locked():
                self._folder.mkdir(exist_ok=True)
                write_atomically(self._folder / URL, f"{self._url}\n".encode())

    def _path(self, info: Mapping[str, Any], suffix: str) -> Path:
        return self._folder / (quote(info["basename"], safe="") + suffix)


def _folder_name(url: str) -> str:
    return sha256(url.encode()).hexdigest()[:16]


def _lock(file: BinaryIO, path: Path, patient: bool) -> None:
    try:
        lock(file, path, wait=patient)
    except BlockingIOError:
        raise Busy from None


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file still has the name that it was opened by."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _cleared(partial: Path) -> bool:
    """Remove a partial file that no process is filling."""
    with partial.open("r+b") as file:
        try:
            _lock(file, partial, patient=False)
        except Busy:
            return False
        if _is_at(partial, file):
            partial.unlink()
        return True
