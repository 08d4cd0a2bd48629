"""Documents from a user's own files (a file, a folder, a glob) and from Hugging Face datasets.

The only place that imports `datasets`.
"""

import glob
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gristmill.corpus import licenses
from gristmill.corpus.config import CorpusConfig, SourceConfig
from gristmill.corpus.documents import Document, Dropped, excerpt_of
from gristmill.errors import InputError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
ROWS_AT_ONCE = 256


class PathSource:
    """The files that a path names. Hidden ones, links to folders and what is not a regular file are not looked at."""

    def __init__(self, name: str, cfg: SourceConfig, corpus: CorpusConfig):
        assert cfg.path is not None
        self.name = name
        self.cfg = cfg
        self.rows = Rows(name, cfg, corpus.allow_licenses)
        self.max_bytes = corpus.filters.max_bytes
        self.files = find_files(cfg.path, f"corpus.sources.{name}.path")
        self.groups = groups_of([file for file in self.files if not is_table(file)])
        self.detail = {"path": cfg.path}

    def num_bytes(self) -> int:
        return sum(_size(path) for path in self.files.values())

    def fingerprint(self) -> str:
        """SHA-256 over the files' relative names and contents."""
        digest = hashlib.sha256()
        for name, path in self.files.items():
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                content = "unreadable"
            digest.update(f"{name}\0{content}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def documents(self, advance: Callable[[float], None]) -> Iterator[Document | Dropped]:
        for name, path in self.files.items():
            label = name.encode("utf-8", "replace").decode()  # a name on disk need not be UTF-8
            try:
                if is_table(name):
                    yield from self._table(label, path)
                else:
                    yield self._text(label, path, self.groups[name])
            except (OSError, EOFError, pa.ArrowException) as error:  # no permission, or a damaged archive
                yield Dropped("unreadable", label, self.name, _size(path), excerpt_of(str(error)))
            advance(_size(path))

    def _text(self, name: str, path: Path, group: str) -> Document | Dropped:
        with path.open("rb") as file:
            data = file.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            return Dropped("too_long", name, self.name, _size(path), excerpt_of(data))
        return Document(name, data, group.encode("utf-8", "replace").decode(), self.cfg.license or licenses.UNKNOWN)

    def _table(self, name: str, path: Path) -> Iterator[Document | Dropped]:
        if name.endswith(".parquet"):
            with pq.ParquetFile(path) as file:
                missing = [column for column in self.rows.columns if column not in file.schema_arrow.names]
                if missing:
                    raise self.rows.no_column(missing[0], name, file.schema_arrow.names)
                number = 0
                for batch in file.iter_batches(ROWS_AT_ONCE, columns=self.rows.columns):
                    for row in batch.to_pylist():
                        yield self.rows.document(f"{name}#{number}", row)
                        number += 1
            return
        with open_lines(path) as file:
            for number, (line, num_bytes) in enumerate(limited_lines(file, 2 * self.max_bytes)):
                yield self._json(f"{name}#{number}", line, num_bytes)

    def _json(self, id: str, line: bytes, num_bytes: int) -> Document | Dropped:
        if num_bytes > len(line):
            return Dropped("too_long", id, self.name, num_bytes, excerpt_of(line))
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            return Dropped("not_json", id, self.name, num_bytes, excerpt_of(line))
        return self.rows.document(id, row)


class DatasetSource:
    """A dataset of the Hugging Face `datasets` library: from the hub, its cache, or a local folder."""

    def __init__(self, name: str, cfg: SourceConfig, corpus: CorpusConfig):
        assert cfg.dataset is not None
        self.name = name
        self.rows = Rows(name, cfg, corpus.allow_licenses)
        self.data = load_dataset(cfg, f"corpus.sources.{name}.dataset")
        for column in self.rows.columns:
            if column not in self.data.column_names:
                raise self.rows.no_column(column, cfg.dataset, self.data.column_names)
        self.detail = {"path": cfg.dataset}

    def num_bytes(self) -> int:
        return int(self.data.data.nbytes)

    def fingerprint(self) -> str:
        return str(self.data._fingerprint)  # the library's own; it has no public name

    def documents(self, advance: Callable[[float], None]) -> Iterator[Document | Dropped]:
        number = 0
        for table in self.data.select_columns(self.rows.columns).with_format("arrow").iter(ROWS_AT_ONCE):
            for row in table.to_pylist():
                yield self.rows.document(f"{self.rows.cfg.dataset_split}#{number}", row)
                number += 1
            advance(table.nbytes)


class Rows:
    """Turns one row of a table, as a dictionary, into a document: which columns, which group, which license."""

    def __init__(self, source: str, cfg: SourceConfig, allowed: tuple[str, ...]):
        self.source = source
        self.cfg = cfg
        self.allowed = allowed
        fields = (cfg.text_field, cfg.group_field, cfg.license_field)
        self.columns = list(dict.fromkeys(field for field in fields if field is not None))

    def document(self, id: str, row: dict[str, Any]) -> Document | Dropped:
        text = row.get(self.cfg.text_field)
        if not isinstance(text, str):
            return Dropped("no_text", id, self.source, 0, f"columns: {', '.join(map(str, row))}"[:200])
        data = text.encode("utf-8", "surrogatepass")  # half a surrogate pair fails in the decode step, with a reason
        group, license = id, self.cfg.license
        if self.cfg.group_field is not None:
            value = row.get(self.cfg.group_field)
            if value is None or value == "":
                return Dropped("no_group", id, self.source, len(data), excerpt_of(data))
            group = str(value).encode("utf-8", "replace").decode()
        if self.cfg.license_field is not None:
            value = row.get(self.cfg.license_field)
            license = licenses.normalise(value) if isinstance(value, str) else licenses.UNKNOWN
            if not licenses.is_allowed(license, self.allowed):
                return Dropped(f"license:{license}", id, self.source, len(data), excerpt_of(data))
        return Document(id, data, group, license or licenses.UNKNOWN)

    def no_column(self, column: str, where: str, columns: list[str]) -> InputError:
        field = next(f for f in ("text_field", "group_field", "license_field") if getattr(self.cfg, f) == column)
        return InputError(
            f"corpus.sources.{self.source}.{field}: {where} has no column {column!r}; it has {', '.join(columns)}"
        )


# ---- files ---------------------------------------------------------------------------------------------


def is_table(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"))


def find_files(path: str, where: str) -> dict[str, Path]:
    """Name relative to the source's root -> file, in the order of the names. Raises InputError when there is none."""
    root = Path(path).expanduser()
    if root.is_file():
        return {root.name: root}
    if root.is_dir():
        found = {file.relative_to(root).as_posix(): file for file in _walk(root, where)}
    elif glob.has_magic(path):
        matches = [Path(match) for match in glob.glob(str(root), recursive=True) if Path(match).is_file()]
        base = Path(os.path.commonpath([match.parent for match in matches])) if matches else root
        found = {match.relative_to(base).as_posix(): match for match in matches}
    else:
        raise InputError(f"{where}: {path!r} does not exist; name a file, a folder or a glob such as 'notes/**/*.md'")
    if not found:
        raise InputError(
            f"{where}: {path!r} holds no files (hidden ones do not count); put text files there or change it"
        )
    return dict(sorted(found.items()))


def _walk(root: Path, where: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        if error.filename == str(root):
            raise InputError(f"{where}: {root} cannot be read ({error.strerror}); change its permissions or the path")

    for folder, folders, files in os.walk(root, onerror=refuse):  # does not follow links: no loops
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            try:
                regular = stat.S_ISREG(path.stat().st_mode)  # a pipe would block for ever
            except OSError:
                regular = False  # a dangling link
            if regular and not name.startswith("."):
                yield path


def groups_of(names: list[str]) -> dict[str, str]:
    """Which documents of a folder stay together: its top-level sub-folders (files beside them count for themselves).

    A folder that has fewer than three such groups is not split well by them: then each file is its own.
    """
    tops = {name: name.split("/")[0] for name in names}
    return tops if len(set(tops.values())) >= 3 else {name: name for name in names}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def open_lines(path: Path) -> io.BufferedReader:
    codec = COMPRESSION.get(path.suffix)
    raw = pa.input_stream(str(path), compression=codec)
    return io.BufferedReader(raw, buffer_size=1 << 20)


def limited_lines(file: io.BufferedReader, limit: int) -> Iterator[tuple[bytes, int]]:
    """Non-blank lines and their sizes. Of a line above `limit` bytes only the beginning is held and given."""
    while line := file.readline(limit):
        num_bytes = len(line)
        if len(line) == limit and not line.endswith(b"\n"):
            line = line[:4096]
            while more := file.readline(1 << 20):
                num_bytes += len(more)
                if more.endswith(b"\n"):
                    break
        if line.strip():
            yield line, num_bytes


def load_dataset(cfg: SourceConfig, where: str) -> Any:
    """A `datasets.Dataset`. The library runs no code that comes with a dataset."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{where}: needs the datasets library; `pip install 'gristmill[data]'`") from None
    name = str(cfg.dataset)
    local = Path(name).expanduser()
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            return loaded[cfg.dataset_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(
            str(local) if local.exists() else name, cfg.dataset_config, split=cfg.dataset_split
        )
    except Exception as error:  # the library raises many kinds: not found, no network, no such split, bad files
        raise InputError(f"{where}: {name!r} could not be loaded: {' '.join(str(error).split())[:300]}") from error
