"""The sources that a user brings: files (a file, a folder, a glob) and Hugging Face datasets.

The only place that imports `datasets`.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gristmill.corpus.config import CorpusConfig, SourceConfig
from gristmill.corpus.documents import Document, Dropped
from gristmill.corpus.paths import EVERYTHING, file_size, find_files, groups_of, listed, open_file
from gristmill.corpus.tables import ROWS_AT_ONCE, Reader, arrow_rows, is_table
from gristmill.errors import InputError
from gristmill.home import expand


class PathSource:
    """The files that a path names."""

    def __init__(self, name: str, cfg: SourceConfig, corpus: CorpusConfig):
        assert cfg.path is not None
        self.name = name
        where = f"corpus.sources.{name}"
        self.reader = Reader(name, f"{where}.{{field}}", cfg, corpus.allow_licenses, corpus.filters)
        found = find_files(cfg.path, f"{where}.path")
        self.files, self.losses = found.files, found.losses
        if not any(map(is_table, self.files)):
            for field in ("license_field", "group_field"):
                if getattr(cfg, field) is not None:
                    raise InputError(
                        f"{where}.{field}: {cfg.path!r} holds no .jsonl or .parquet files, and other files have no "
                        f"columns; {'give license instead' if field == 'license_field' else 'leave it out'}"
                    )
        self.groups = groups_of([file for file in self.files if not is_table(file)])
        self.detail = {"path": cfg.path}

    def num_bytes(self) -> int:
        return sum(file_size(path) for path in self.files.values())

    def fingerprint(self) -> str:
        """SHA-256 over the files' relative names and contents."""
        digest = hashlib.sha256()
        for name, path in self.files.items():
            digest.update(f"{name}\0{_sha256(path)}\n".encode("utf-8", "surrogateescape"))
        for name in self.losses:
            digest.update(f"{name}\0lost\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def documents(self, advance: Callable[[float], None]) -> Iterator[Document | Dropped]:
        for name, loss in self.losses.items():
            yield Dropped(loss.reason, _printable(name), self.name, 0, loss.detail)
        for name, path in self.files.items():
            yield from self.reader.read(_printable(name), path, _printable(self.groups.get(name, name)))
            advance(file_size(path))
        self.reader.check_columns()


class DatasetSource:
    """A dataset of the Hugging Face `datasets` library: from the hub, its cache, or a local folder."""

    def __init__(self, name: str, cfg: SourceConfig, corpus: CorpusConfig):
        assert cfg.dataset is not None
        self.name = name
        self.reader = Reader(name, f"corpus.sources.{name}.{{field}}", cfg, corpus.allow_licenses, corpus.filters)
        self.data, self.content = load_dataset(cfg, f"corpus.sources.{name}.dataset")
        self.reader.check_schema(self.data.data.schema, cfg.dataset)
        self.detail = {"path": cfg.dataset}

    def num_bytes(self) -> int:
        return int(self.data.data.nbytes)

    def fingerprint(self) -> str:
        return self.content

    def documents(self, advance: Callable[[float], None]) -> Iterator[Document | Dropped]:
        number = 0
        for table in self.data.select_columns(self.reader.columns).with_format("arrow").iter(ROWS_AT_ONCE):
            for batch in table.to_batches():
                for row in arrow_rows(batch):
                    yield self.reader.document(f"{self.reader.cfg.dataset_split}#{number}", row)
                    number += 1
            advance(table.nbytes)


def load_dataset(cfg: SourceConfig, where: str) -> tuple[Any, str]:
    """A `datasets.Dataset` and the identity of its content. The library runs no code that comes with a dataset.

    The library recognizes local files by the time of their last change. Here the content decides: it is the identity,
    and each content has a cache of its own.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{where}: needs the datasets library; `pip install 'gristmill[data]'`") from None
    name = str(cfg.dataset)
    local = expand(name, where)
    try:
        if not local.exists():
            loaded = datasets.load_dataset(name, cfg.dataset_config, split=cfg.dataset_split)
            return loaded, str(loaded._fingerprint)  # the library's own, of the commit; it has no public name
        files = {path for path, _ in listed(local, EVERYTHING, where)} if local.is_dir() else {local}
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            loaded = loaded[cfg.dataset_split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return loaded, _content_hash(local, files)
        chosen = datasets.load_dataset_builder(str(local), cfg.dataset_config).config.data_files or {}
        files |= {Path(file) for names in chosen.values() for file in names}  # also those behind links to folders
        content = _content_hash(local, files)
        cache = Path(datasets.config.HF_DATASETS_CACHE, f"gristmill-{content[:16]}")
        return datasets.load_dataset(
            str(local), cfg.dataset_config, split=cfg.dataset_split, cache_dir=str(cache)
        ), content
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: not found, no network, no such split, bad files
        raise InputError(f"{where}: {name!r} could not be loaded: {' '.join(str(error).split())[:300]}") from error


def _content_hash(folder: Path, files: set[Path]) -> str:
    lines = sorted(f"{os.path.relpath(file, folder)}\0{_sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def _printable(name: str) -> str:
    """A name on disk need not be UTF-8."""
    return name.encode("utf-8", "replace").decode()
