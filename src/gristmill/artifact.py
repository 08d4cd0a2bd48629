"""Artifacts: immutable directories whose manifest says what they hold and where it came from.

An artifact is a directory with `manifest.json`. The manifest is written last, after every other file has
reached the disk, so a directory without one does not count: it is what an interrupted stage left behind.
The content hash covers paths and bytes only (no clock, no figures): two runs that made the same files have
the same content hash. This room knows nothing of the stages.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gristmill.errors import Failure, InputError
from gristmill.locks import lock

MANIFEST = "manifest.json"
STATE = ".state"  # locks and databases that change in place; verify names it as not covered
HASHED_BYTES = 16 << 20  # read at a time
VERSIONED = ("gristmill", "torch", "numpy", "pyarrow", "tokenizers", "tiktoken", "safetensors", "transformers")


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a stage's function says of the files that it wrote.

    `sources` is set where data enters: name -> {"documents", "bytes", "licenses": {SPDX: bytes}, ...}.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A committed directory and its parsed manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def content(self) -> str:
        """SHA-256 over the sorted paths and file hashes."""
        return self.manifest["content"]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"]

    @property
    def licenses(self) -> dict[str, int]:
        """SPDX expression -> bytes of text under it, over all data that this artifact descends from."""
        return self.manifest["licenses"]


# ---- hashing -------------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """The one JSON spelling of a value: sorted keys, two-space indent, final newline.

    A lone surrogate, Python's form of a path's byte that is not UTF-8, becomes JSON's escape for it.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")


def sha256_file(path: Path, advance: Callable[[float], None] = lambda num_bytes: None) -> str:
    """`advance` is told the bytes that were read since it was told last."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(HASHED_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def stage_key(kind: str, format: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """A stage's identity: what it is, how it is set, and the content hashes of what it reads."""
    return hashlib.sha256(canonical([kind, format, config, dict(inputs)])).hexdigest()


def content_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = "".join(f"{path}\0{files[path]['sha256']}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


# ---- writing -------------------------------------------------------------------------------------------


def prepare(path: Path) -> Path:
    """An empty directory to build an artifact in; clears what an interrupted build left there."""
    if (path / MANIFEST).exists():
        raise Failure(f"{path} already holds a committed artifact; artifacts are never overwritten")
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def require_room(out: Path, num_bytes: int) -> None:
    """Raises Failure when the disk that `out` will lie on has no room for it; its parent must exist."""
    free = shutil.disk_usage(out.parent).free
    if num_bytes > free:
        raise Failure(
            f"{out} needs {num_bytes / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB left; free some room, or "
            "choose a place on another disk"
        )


@contextmanager
def building(out: Path, num_bytes: int) -> Iterator[Path]:
    """A directory beside `out` to build in; it becomes `out` when all went well, and goes away when not.

    Raises InputError when something is at `out` already or it cannot be a directory, Failure when the disk has no room
    for `num_bytes` or another process builds the same.
    """
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    state = partial / STATE  # by it, what a killed build left is known from what is somebody's own
    try:
        if out == Path.cwd() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise InputError(f"{out} is there already; give a new directory, or remove it")
        if partial.exists() and not state.is_dir():
            raise InputError(f"{partial} is in the way; move it")
        state.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        if problem.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise
        raise InputError(f"{out} cannot be a directory: {problem.strerror}; choose another place") from None
    with (state / "lock").open("w") as file:
        try:
            lock(file, state / "lock")
        except BlockingIOError:
            raise Failure(f"another process is building {out}; wait for it, or choose another place") from None
        except Failure:  # nobody can hold a lock here, so nobody else is building
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            for left in partial.iterdir():
                if left.name != STATE:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            require_room(out, num_bytes)
            yield partial
            shutil.rmtree(state)
            partial.replace(out)
            sync(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def commit(
    path: Path,
    *,
    kind: str,
    key: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    built: Built,
    files: Iterable[Path] | None = None,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Artifact:
    """Make the files under `path` (or the named ones) an artifact: hash and fsync each, then write the manifest.

    known: name -> {"bytes", "sha256"} of files that were fsynced and read back already; they are not read again.
    """
    paths = sorted(walk(path) if files is None else files)
    covered = dict(known or {})
    for file in paths:
        if (name := file.relative_to(path).as_posix()) not in covered:
            sync(file)
            covered[name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    assert len(covered) == len(paths), "a file that is known is not there"
    for folder in sorted({file.parent for file in paths}):
        sync(folder)
    manifest = {
        "kind": kind,
        "key": key,
        "config": config,
        "inputs": {name: ancestry(artifact, path) for name, artifact in inputs.items()},
        "sources": built.sources,
        "licenses": licenses_of(built, inputs),
        "files": covered,
        "content": content_hash(covered),
        "metrics": built.metrics,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_manifest(path, manifest)
    sync(path.parent)
    return load(path)


def ancestry(artifact: Artifact, seen_from: Path) -> dict[str, Any]:
    """What a manifest keeps of an input: enough to tell its lineage when the model has moved away alone."""
    kept = {name: artifact.manifest[name] for name in ("kind", "key", "content", "inputs")}
    # A manifest travels with what descends from it: where a source lay on this machine does not.
    sources = artifact.manifest["sources"]
    kept["sources"] = {
        name: source | ({"path": Path(source["path"]).name} if "path" in source else {})
        for name, source in sources.items()
    }
    return kept | {"path": Path(os.path.relpath(artifact.path, seen_from)).as_posix()}


def licenses_of(built: Built, inputs: Mapping[str, Artifact]) -> dict[str, int]:
    """Bytes of text under each license: summed over the sources that enter here, or else those of the inputs.

    Of several inputs the larger count is taken: they descend from one corpus, which is not to be counted twice.
    """
    total: dict[str, int] = {}
    for source in built.sources.values():
        for license, num_bytes in source["licenses"].items():
            total[license] = total.get(license, 0) + num_bytes
    for artifact in inputs.values():
        for license, num_bytes in artifact.licenses.items():
            total[license] = max(total.get(license, 0), num_bytes)
    return total


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    sealed = {**manifest, "manifest": hashlib.sha256(canonical(manifest)).hexdigest()}
    write_atomically(path / MANIFEST, canonical(sealed))


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees either the old bytes or the new ones."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove an artifact, or what was left of one."""
    (path / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed artifact does not count
    shutil.rmtree(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": f"{sys.platform}-{platform.machine()}"}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def walk(path: Path) -> Iterator[Path]:
    """The files of one artifact: not its manifest, not the artifacts nested below it, not `.state`."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if entry.name != STATE and not (entry / MANIFEST).exists():
                yield from walk(entry)
        elif entry.name not in (MANIFEST, f".{MANIFEST}.partial"):
            yield entry


# ---- reading -------------------------------------------------------------------------------------------


def load(path: Path) -> Artifact:
    """Read a manifest and check its own seal.

    Raises InputError when there is none, Failure when it is damaged.
    """
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is not an artifact: it has no {MANIFEST}") from None
    return Artifact(path, parse_manifest(data, str(file)))


def parse_manifest(data: bytes, name: str) -> dict[str, Any]:
    """The manifest that a file's bytes are. Raises Failure, which begins with `name`, when they are damaged."""
    try:
        manifest = json.loads(data)
        seal = manifest.pop("manifest")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Failure(f"{name} is damaged: not a manifest") from None
    if hashlib.sha256(canonical(manifest)).hexdigest() != seal or canonical({**manifest, "manifest": seal}) != data:
        raise Failure(f"{name} is damaged: its text does not match its own hash")
    return dict(manifest)


def load_ours(path: Path) -> Artifact | None:
    """`load`, and None where there is no manifest, or one that another program wrote."""
    try:
        parsed = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        parsed = {"content": None}  # damaged: `load` says so
    return load(path) if isinstance(parsed, dict) and "content" in parsed else None


def standing(path: Path, key: str) -> Artifact | None:
    """The artifact at `path` if it is committed under this key and each file is there in its full size."""
    if not (path / MANIFEST).exists():
        return None
    artifact = load(path)
    if artifact.key != key:
        return None
    for name, entry in artifact.manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise Failure(f"{file} is missing or cut short; remove {path} and run again to rebuild it")
    return artifact


@dataclass(frozen=True)
class Verification:
    """`problems`: one line each, naming the file. `not_covered`: paths that no manifest vouches for."""

    num_files: int
    num_bytes: int
    problems: list[str]
    not_covered: list[str]


def verify(path: Path) -> Verification:
    """Hash again every file that the manifests at and below `path` cover; a run must also have its stages' artifacts.

    Raises InputError when there is no manifest at all, Failure when the one of `path` itself is damaged.
    """
    folders = sorted(file.parent for file in path.rglob(MANIFEST))
    if path in folders or not folders:
        load(path)
    num_files = num_bytes = 0
    problems: list[str] = []
    not_covered: list[str] = []
    for folder in folders:
        try:
            manifest = load(folder).manifest
        except Failure as damage:
            problems.append(str(damage))
            continue
        covered: dict[str, Any] = manifest["files"]
        num_files += 1  # the manifest itself
        if manifest["kind"] == "run":
            problems += _absent_stages(folder, manifest["inputs"])
        for name, entry in covered.items():
            file = folder / name
            num_files += 1
            num_bytes += entry["bytes"]
            if not file.is_file():
                problems.append(f"{file} is missing")
            elif sha256_file(file) != entry["sha256"]:
                problems.append(f"{file} is damaged: its bytes do not match their SHA-256")
        extra = {file.relative_to(folder).as_posix() for file in walk(folder)} - set(covered)
        not_covered += [str(folder / name) for name in sorted(extra)]
        if (folder / STATE).exists():
            not_covered.append(str(folder / STATE))
    return Verification(num_files, num_bytes, problems, not_covered)


def _absent_stages(run: Path, inputs: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in inputs.items():
        stage = run / entry["path"]
        try:
            if load(stage).content != entry["content"]:
                yield f"{stage} is not the {name} that this run was made with"
        except (InputError, Failure):
            yield f"{stage / MANIFEST} is missing or damaged: the run's {name} does not count without it"


# ---- lineage -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """One node of a lineage: an artifact, or (kind "source") a place where data entered.

    `id` is a hash over the node and all its ancestors. Two artifacts can have equal bytes and different ancestors: a
    tokenizer that was taken over from another model, a model that was exported and imported again.
    """

    id: str
    name: str
    kind: str
    key: str
    content: str
    detail: dict[str, Any]
    inputs: list["Origin"]


def lineage(path: Path) -> Origin:
    """From an artifact back to each source and license, read from its manifest alone."""
    return origin(path.name, load(path).manifest)


def origin(name: str, manifest: Mapping[str, Any]) -> Origin:
    """`manifest`: an artifact's, or what a manifest keeps of an input."""
    inputs = [_source(source, detail) for source, detail in sorted(manifest["sources"].items())]
    inputs += [origin(parent, entry) for parent, entry in sorted(manifest["inputs"].items())]
    kind, key, content = manifest["kind"], manifest["key"], manifest["content"]
    identity = _digest([kind, key, content, [parent.id for parent in inputs]])
    return Origin(identity, name, kind, key, content, {"path": manifest.get("path", "")}, inputs)


def _source(name: str, detail: Mapping[str, Any]) -> Origin:
    known = {key: value for key, value in detail.items() if key != "path"}  # of which descendants keep the last part
    identity = _digest(["source", name, known])
    return Origin(identity, name, "source", "", str(detail.get("fingerprint", "")), dict(detail), [])


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
