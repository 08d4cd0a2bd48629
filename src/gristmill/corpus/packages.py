"""Documents from installed Python packages and the standard library: nothing to download, licenses in the metadata.

Reads files that the distributions' RECORD names; executes none of them (pydoc's topics, a table of the standard
library, are imported).
"""

import ast
import hashlib
import inspect
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from gristmill.corpus import licenses
from gristmill.corpus.config import SourceConfig
from gristmill.corpus.documents import Document, Dropped, excerpt_of
from gristmill.errors import InputError

STDLIB = "stdlib"
STDLIB_LICENSE = "Python-2.0"  # SPDX's name for the whole stack of licenses that CPython's LICENSE holds
TOPICS = f"{STDLIB}/pydoc_data/topics.py"  # chapters of prose in one table of strings
PROSE_SUFFIXES = (".md", ".rst", ".txt")
MIN_DOCSTRING_CHARS = 40  # below, it says little more than the name above it

TEST_FOLDERS = {"test", "tests", "testing", "idle_test", "test-examples"}
TEST_FILE = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py")
VENDORED_FOLDERS = {"vendor", "vendored", "vendors", "extern", "externals", "third_party", "thirdparty"}
LICENSE_FILE = re.compile(r"(licen[cs]e|copying)[^.]*(\.txt|\.md|\.rst)?", re.IGNORECASE)
NOT_PROSE = re.compile(
    r"licen[cs]e|copying|notice|authors|cmakelists|requirements|top_level|entry_points", re.IGNORECASE
)


@dataclass(frozen=True)
class Work:
    """One installed distribution, or one top-level module or package of the standard library: a group.

    `files`: path as its document ids show it -> (where it is, an identity of its content). `foreign`: folders, as
    the ids show them, that carry a license text of their own. `description`: the metadata's long one.
    """

    group: str
    version: str
    license: str
    files: dict[str, tuple[Path, str]]
    foreign: tuple[str, ...] = ()
    description: str = ""


class PackagesSource:
    """Modules or prose of the packages that are named."""

    def __init__(self, name: str, cfg: SourceConfig, allowed: tuple[str, ...]):
        assert cfg.packages is not None
        self.name = name
        self.take = cfg.take
        self.allowed = allowed
        self.works: list[Work] = []
        self.detail = {"packages": dict[str, str]()}
        for package in sorted(set(cfg.packages), key=canonical):
            works = (
                stdlib_works() if package == STDLIB else [distribution_work(package, f"corpus.sources.{name}.packages")]
            )
            self.works += works
            self.detail["packages"][package] = works[0].version
        self.works.sort(key=lambda work: work.group)

    def num_bytes(self) -> int:
        """Bytes that `documents` will report to `advance`."""
        return sum(_size(path) for work in self.works for path, _ in self._candidates(work).values())

    def fingerprint(self) -> str:
        """SHA-256 over what is read: names and versions, and each file's identity in its distribution's RECORD."""
        digest = hashlib.sha256()
        for work in self.works:
            digest.update(f"{work.group}=={work.version}\0{work.license}\0{work.description}\0".encode())
            for name, (_, identity) in sorted(self._candidates(work).items()):
                digest.update(f"{name}\0{identity}\n".encode())
        return digest.hexdigest()

    def documents(self, advance: Callable[[float], None]) -> Iterator[Document | Dropped]:
        for work in self.works:
            found = list(self._of_work(work, advance))
            yield from sorted(found, key=lambda item: item.id)

    def _candidates(self, work: Work) -> dict[str, tuple[Path, str]]:
        suffixes = (".py",) if self.take == "code" else (".py", *PROSE_SUFFIXES)
        return {
            name: file
            for name, file in work.files.items()
            if name.endswith(suffixes)
            and name != TOPICS
            and not (name.endswith(PROSE_SUFFIXES) and NOT_PROSE.search(PurePosixPath(name).name))
        }

    def _of_work(self, work: Work, advance: Callable[[float], None]) -> Iterator[Document | Dropped]:
        for name, (path, _) in sorted(self._candidates(work).items()):
            num_bytes = _size(path)
            reason = unwanted(name, work.foreign)
            if reason is None and not licenses.is_allowed(work.license, self.allowed):
                reason = f"license:{work.license}"
            if reason is not None:
                yield Dropped(reason, name, self.name, num_bytes, "")
            else:
                yield from self._of_file(work, name, path)
            advance(num_bytes)
        if self.take == "prose" and licenses.is_allowed(work.license, self.allowed):
            if work.description:
                yield Document(f"{work.group}/description", work.description.encode(), work.group, work.license)
            if TOPICS in work.files:
                yield from pydoc_topics(work)

    def _of_file(self, work: Work, name: str, path: Path) -> Iterator[Document | Dropped]:
        try:
            data = path.read_bytes()
        except OSError as error:
            yield Dropped("unreadable", name, self.name, 0, str(error.strerror))
            return
        if self.take == "code" or name.endswith(PROSE_SUFFIXES):
            yield Document(name, data, work.group, work.license)
            return
        module = module_name(name)
        try:
            text = docstrings(data, module)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # what ast raises on what is not Python
            yield Dropped("not_python", name, self.name, len(data), excerpt_of(data))
            return
        if text:
            yield Document(f"{name}:docstrings", text.encode("utf-8", "surrogatepass"), work.group, work.license)


# ---- which files ---------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """A distribution's name as packaging compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution_work(package: str, where: str) -> Work:
    """Raises InputError when the package is not installed or does not say which files are its own."""
    try:
        found = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        raise InputError(
            f"{where}: {package!r} is not installed; `pip install {package}` or take it off the list"
        ) from None
    if found.files is None:
        raise InputError(
            f"{where}: {package!r} has no RECORD of its files; install it with pip, or take it off the list"
        )
    group = canonical(found.metadata["Name"])
    files, license_files = {}, []
    for entry in found.files:
        if entry.parts[0] == "..":  # scripts and shared data, outside the package
            continue
        path = Path(str(found.locate_file(entry)))
        if any(part.endswith((".dist-info", ".egg-info")) for part in entry.parts):
            if LICENSE_FILE.fullmatch(entry.name):
                license_files.append(path)
        else:
            identity = entry.hash.value if entry.hash else str(entry.size)
            files[f"{group}/{entry.as_posix()}"] = (path, identity)

    def license_texts() -> Iterator[str]:
        for path in sorted(license_files):
            if path.is_file():
                yield path.read_text("utf-8", "replace")

    body = found.metadata.get("Description") or found.metadata.get_payload()  # type: ignore[attr-defined]
    description = body.strip() if isinstance(body, str) else ""
    return Work(
        group,
        found.version,
        licenses.of_package(found.metadata, license_texts),
        files,
        foreign_folders(list(files)),
        description,
    )


def stdlib_works() -> list[Work]:
    """The standard library, a work for each top-level name that Python documents as its own."""
    root = Path(sysconfig.get_path("stdlib"))
    by_group: dict[str, dict[str, tuple[Path, str]]] = {}
    for entry in sorted(root.iterdir()):
        group = entry.stem if entry.suffix == ".py" else entry.name
        if group not in sys.stdlib_module_names:  # site-packages, generated build settings, test suites
            continue
        for path in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
            name = f"{STDLIB}/{path.relative_to(root).as_posix()}"
            by_group.setdefault(group, {})[name] = (path, str(_size(path)))
    version = platform.python_version()
    return [Work(group, version, STDLIB_LICENSE, files) for group, files in sorted(by_group.items())]


def foreign_folders(names: list[str]) -> tuple[str, ...]:
    """Folders inside a package with a license text of their own: copies of other works, which the package's license
    need not cover and whose originals may be in the corpus too.
    """
    modules = [name for name in names if name.endswith(".py")]
    found = {
        str(PurePosixPath(name).parent) + "/" for name in names if LICENSE_FILE.fullmatch(PurePosixPath(name).name)
    }
    # A folder around every module is the package itself, however deep.
    return tuple(sorted(folder for folder in found if not all(name.startswith(folder) for name in modules)))


def unwanted(name: str, foreign: tuple[str, ...]) -> str | None:
    """Why a file is left out by where it lies: tests, or a copy of somebody else's work under an unknown license."""
    *folders, file = PurePosixPath(name).parts[1:]
    if name.startswith(foreign) or VENDORED_FOLDERS & {folder.strip("_") for folder in folders}:
        return "vendored"
    if TEST_FOLDERS & set(folders) or TEST_FILE.fullmatch(file):
        return "test"
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ---- prose ---------------------------------------------------------------------------------------------


def module_name(name: str) -> str:
    """`networkx/networkx/algorithms/__init__.py` -> `networkx.algorithms`."""
    parts = PurePosixPath(name).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def docstrings(source: bytes, module: str) -> str:
    """The docstrings of a module and of its classes and functions, each below its qualified name (`__qualname__`).

    Raises what `ast.parse` raises. About 8 MB of source a second.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        tree = ast.parse(source)
    sections = [
        f"# {name or module}\n\n{text}\n" for name, text in _documented(tree, "") if len(text) >= MIN_DOCSTRING_CHARS
    ]
    return "\n".join(sections)


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node, clean=False)
    if text:
        yield name, inspect.cleandoc(text).rstrip()
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):  # what is inside a function is its own affair
        for child in _definitions(node.body):
            yield from _documented(child, f"{name}.{child.name}".lstrip("."))


def _definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions of a body, those under `if` and `try` included."""
    for statement in body:
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield statement
            case ast.If():
                yield from _definitions(statement.body + statement.orelse)
            case ast.Try():
                handlers = [inner for handler in statement.handlers for inner in handler.body]
                yield from _definitions(statement.body + handlers + statement.orelse + statement.finalbody)


def pydoc_topics(work: Work) -> Iterator[Document]:
    """The chapters of the language reference that `help("…")` shows."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield Document(f"{STDLIB}/pydoc_data/topics:{topic}", text.encode(), work.group, work.license)
