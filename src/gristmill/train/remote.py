"""Copies of checkpoints elsewhere, so that a lost machine loses nothing: whatever URL fsspec knows, below it the
training's key. The same rule as on disk: the manifest is written last and removed first, and what has none does not
count.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from gristmill.artifact import MANIFEST, Artifact, load, parse_manifest, remove, sha256_file, sync, write_atomically
from gristmill.errors import Failure
from gristmill.streaming.remote import filesystem
from gristmill.train.config import CheckpointConfig

OURS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # who only reads there meets these here


class Remote:
    """One training's place there. Raises InputError for a URL that nothing here can open."""

    def __init__(self, url: str, key: str) -> None:
        self.fs, root = filesystem("train.checkpoint.copy_to", url)
        self.url, self.key, self.root = url, key, f"{root}/{key[:8]}"

    def committed(self) -> dict[int, str]:
        """Step -> path of the checkpoints that have a manifest."""
        return {step: path for step, path in self._all().items() if self.fs.exists(f"{path}/{MANIFEST}")}

    def _all(self) -> dict[int, str]:
        self.fs.invalidate_cache()
        try:
            paths = [path.rstrip("/") for path in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return {}
        steps = {path.rpartition("/step-")[2]: path for path in paths}
        return {int(step): path for step, path in steps.items() if step.isdecimal()}

    def copy(self, artifact: Artifact) -> None:
        there = f"{self.root}/{artifact.path.name}"
        self._remove(there)
        for name, entry in artifact.manifest["files"].items():
            self.fs.makedirs(str(PurePosixPath(there, name).parent), exist_ok=True)
            self.fs.put_file(str(artifact.path / name), f"{there}/{name}")
            if (found := self.fs.size(f"{there}/{name}")) != entry["bytes"]:
                raise Failure(f"{name} arrived with {found:,} bytes of {entry['bytes']:,}")
        self.fs.pipe_file(f"{there}/{MANIFEST}", (artifact.path / MANIFEST).read_bytes())

    def prune(self, cfg: CheckpointConfig) -> None:
        """Remove what the rule does not keep, and what an interrupted copy left."""
        kept = cfg.kept(self.committed())
        for step, path in self._all().items():
            if step not in kept:
                self._remove(path)

    def _remove(self, path: str) -> None:
        for part, recursive in ((f"{path}/{MANIFEST}", False), (path, True)):
            if self.fs.exists(part):
                self.fs.rm(part, recursive=recursive)

    def fetch(self, there: str, here: Path) -> Artifact | str:
        """A good checkpoint in `here`, or what is wrong with the copy. Replaces what is there."""
        try:
            data = self.fs.cat_file(f"{there}/{MANIFEST}")
            manifest = parse_manifest(data, f"{there}/{MANIFEST}")
            if manifest["key"] != self.key:
                return f"{there} belongs to another training"
            if here.exists():
                remove(here)
            here.mkdir(parents=True)
            for name, entry in manifest["files"].items():
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts:
                    return f"{there}/{MANIFEST} names {name!r}, which lies elsewhere"
                file = here / path
                with _room_for(file):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    self.fs.get_file(f"{there}/{name}", str(file))
                if sha256_file(file) != entry["sha256"]:
                    return f"{there}/{name} is damaged: its bytes do not match their SHA-256"
                sync(file)
                sync(file.parent)
        except FileNotFoundError as problem:
            return f"{there} lacks a file: {problem}"
        except Failure as damage:
            return str(damage)
        write_atomically(here / MANIFEST, data)
        sync(here.parent)
        return load(here)


@contextmanager
def _room_for(file: Path) -> Iterator[None]:
    """An error of the disk here names the file, which a store's library need not do."""
    try:
        yield
    except OSError as problem:
        if problem.errno in OURS:
            raise OSError(problem.errno, problem.strerror, str(file)) from None
        raise


def fetch_latest(url: str, folder: Path, key: str) -> tuple[Artifact | None, list[str]]:
    """The newest good copy under this key, fetched into `folder`, and what is wrong with newer ones. To be asked where
    `latest_checkpoint` finds none: what `folder` has at the same step is replaced.

    Raises Failure when `url` does not answer, so that training does not begin anew for want of a network; OSError when
    there is no room here.
    """
    remote, damage = Remote(url, key), list[str]()
    try:
        for _, there in sorted(remote.committed().items(), reverse=True):
            found = remote.fetch(there, folder / there.rpartition("/")[2])
            if isinstance(found, Artifact):
                return found, damage
            damage.append(found)
    except Exception as problem:  # each store's library raises its own
        if getattr(problem, "errno", None) in OURS:
            raise
        raise Failure(f"{url} could not be read: {problem}; its checkpoints are wanted, since none is here") from None
    return None, damage
