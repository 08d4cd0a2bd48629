"""Finds and opens the files that a source's path names: one file, a folder, or a glob.

Every file that is listed is either found or a loss with its reason. Paths may be longer than PATH_MAX: folders and
files are opened relative to an open folder, a part of the path at a time.
"""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from gristmill.errors import InputError
from gristmill.home import expand

MAX_PATH_BYTES = 4000  # of one system call; Linux allows 4,095, others fewer than they say
EVERYTHING = ["**", "*"]


@dataclass(frozen=True)
class Loss:
    """Something that was listed but cannot be read. `reason`: as in drops.json; `detail`: what the system says."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Found:
    """Files and losses by their name relative to the source's root, in the order of the names."""

    files: dict[str, Path]
    losses: dict[str, Loss]


def find_files(path: str, where: str) -> Found:
    """The files that `path` names. Hidden files, hidden folders, pipes and devices are skipped.

    A folder and `**` do not follow links to folders; the other parts of a glob do, as in bash.

    Raises:
        InputError: `path` names no file, or its folder cannot be read. The message starts with `where`.
    """
    root = expand(path, where)
    has_magic = glob.has_magic(path)
    mode = 0 if has_magic and not os.path.exists(root) else _mode(root, where)
    if stat.S_ISREG(mode):
        return Found({root.name: root}, {})
    if stat.S_ISDIR(mode):
        base, items = root, list(listed(root, EVERYTHING, where))
    elif mode:
        raise InputError(f"{where}: {path!r} is neither a file nor a folder; name a file, a folder or a glob")
    elif has_magic:
        base, items = _matches(root, where)
    else:
        raise InputError(f"{where}: {path!r} does not exist; name a file, a folder or a glob such as 'notes/**/*.md'")
    files = {os.path.relpath(file, base): file for file, loss in items if loss is None}
    losses = {os.path.relpath(file, base): loss for file, loss in items if loss is not None}
    if not files:
        example = next((f"; {name} cannot be read: {loss.detail}" for name, loss in sorted(losses.items())), "")
        raise InputError(
            f"{where}: {path!r} holds no files (hidden ones do not count){example}; put text files there or change it"
        )
    return Found(dict(sorted(files.items())), dict(sorted(losses.items())))


def groups_of(names: list[str]) -> dict[str, str]:
    """Group of each file: its top-level sub-folder. A file outside of the sub-folders is its own group.

    A folder that has fewer than three such groups is not split well by them: then each file is its own.
    """
    tops = {name: name.split("/")[0] for name in names}
    return tops if len(set(tops.values())) >= 3 else {name: name for name in names}


# ---- open ----------------------------------------------------------------------------------------------


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading, however long its path is. Raises OSError."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        return path.open("rb")
    with _folder(path.parent) as folder:
        return os.fdopen(os.open(path.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb")


def file_size(path: Path) -> int:
    """Bytes of a file; 0 where that cannot be found out."""
    try:
        return path.stat().st_size
    except OSError:
        try:
            with open_file(path) as file:
                return os.fstat(file.fileno()).st_size
        except OSError:
            return 0


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    """File descriptor of a folder."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    parts = list(path.parts) or ["."]
    fd: int | None = None
    while parts:
        length, count = 0, 0
        while count < len(parts) and length + len(os.fsencode(parts[count])) < MAX_PATH_BYTES:
            length += len(os.fsencode(parts[count])) + 1
            count += 1
        count = max(count, 1)
        previous = fd
        try:
            fd = os.open(os.path.join(*parts[:count]), flags, dir_fd=previous)
        finally:
            if previous is not None:
                os.close(previous)
        parts = parts[count:]
    assert fd is not None
    try:
        yield fd
    finally:
        os.close(fd)


# ---- list ----------------------------------------------------------------------------------------------


def _matches(pattern: Path, where: str) -> tuple[Path, list[tuple[Path, Loss | None]]]:
    """The folder that all files matching a glob share, and what matches."""
    first = next(number for number, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:first])
    if not stat.S_ISDIR(_mode(root, where)):
        return root, []
    items = list(listed(root, list(pattern.parts[first:]), where))
    folders = [file.parent for file, loss in items if loss is None]
    return (Path(os.path.commonpath(folders)) if folders else root), items


def listed(root: Path, parts: list[str], where: str) -> Iterator[tuple[Path, Loss | None]]:
    """Files below `root` that match the parts of a glob, and the losses among them.

    Each folder is listed once for all ways in which the parts can lead to it: `places` are the parts that its entries
    may match.
    """
    if parts[-1] == "**":
        parts = [*parts, "*"]
    real_root = os.path.realpath(root)
    pending = [(root, frozenset({0}))]
    while pending:
        path, places = pending.pop()
        try:
            with _folder(path) as folder:
                for name, is_folder, is_link, loss in _entries(folder):
                    deeper = _below(name, is_link, parts, _with_skipped(places, parts))
                    if is_folder and deeper:
                        pending.append((path / name, deeper))
                    elif is_folder and is_link and not name.startswith(".") and _leads_out(path / name, real_root):
                        if any(parts[place] == "**" for place in places):
                            yield path / name, Loss("linked_folder", "links to other folders are not followed")
                    elif not is_folder and _is_match(name, parts, _with_skipped(places, parts)):
                        yield path / name, loss
        except OSError as error:
            if path == root:
                raise _no_access(root, where, error) from None
            yield path, Loss("unreadable", f"{error.strerror} (a folder)")


def _entries(folder: int) -> Iterator[tuple[str, bool, bool, Loss | None]]:
    """Name, is it a folder, is it a link, and why it cannot be read; for the folders and regular files of a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            loss = None
            try:
                mode = os.stat(entry.name, dir_fd=folder).st_mode
            except OSError as error:
                linked = " (a link)" if entry.is_symlink() else ""
                loss = Loss("unreadable", f"{error.strerror}{linked}")
                mode = stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG
            if stat.S_ISDIR(mode) or stat.S_ISREG(mode):  # reading a pipe would block forever
                yield entry.name, stat.S_ISDIR(mode), entry.is_symlink(), loss


def _with_skipped(places: frozenset[int], parts: list[str]) -> set[int]:
    """Places, and those behind each `**`, which also matches no folder at all."""
    reached = set(places)
    for place in range(len(parts)):
        if place in reached and parts[place] == "**":
            reached.add(place + 1)
    return reached


def _is_match(name: str, parts: list[str], places: set[int]) -> bool:
    return len(parts) - 1 in places and _matches_part(name, parts[-1])


def _below(name: str, is_link: bool, parts: list[str], places: set[int]) -> frozenset[int]:
    """The places of a folder's entries, when it is listed at `places`."""
    stays = {p for p in places if parts[p] == "**" and not is_link and not name.startswith(".")}
    moves = {p + 1 for p in places if p + 1 < len(parts) and parts[p] != "**" and _matches_part(name, parts[p])}
    return frozenset(stays | moves)


def _matches_part(name: str, part: str) -> bool:
    return fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))


def _leads_out(link: Path, real_root: str) -> bool:
    """Whether a link to a folder leads to files that are not listed anyway: outside of the root, or hidden in it."""
    target = os.path.realpath(link)
    if os.path.commonpath([target, real_root]) == real_root:
        return any(part.startswith(".") for part in Path(target).relative_to(real_root).parts)
    return not Path(real_root).is_relative_to(target)  # a link to a folder above is a loop


def _mode(path: Path, where: str) -> int:
    """The type of file as in `st_mode`; 0 where there is none."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        return 0
    except OSError as error:
        raise _no_access(path, where, error) from None


def _no_access(root: Path, where: str, error: OSError) -> InputError:
    return InputError(f"{where}: {root} cannot be read ({error.strerror}); change its permissions or the path")
