"""Shard files of MosaicML Streaming's MDS format, version 2: a writer and a random-access reader.

A shard: uint32 n | uint32 offsets[n + 1], from the start of the file | the configuration as JSON | n samples.
A sample: uint32 sizes of its variable-sized columns | the columns' bytes; columns are sorted by name.
`index.json` beside the shards names them, with sizes and hashes. Written from the format; the bytes equal those of
MosaicML's own writer for the same samples and settings.
"""

import json
import mmap
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gristmill.errors import Failure, InputError
from gristmill.streaming.cache import ShardFiles
from gristmill.streaming.compression import compress, decompress, parse
from gristmill.streaming.config import ShardsConfig
from gristmill.streaming.encodings import encoding
from gristmill.streaming.index import INDEX, damage, digest, mapped, read_index, stored
from gristmill.streaming.order import OPEN_SHARDS

MAX_OPEN_SHARDS = 2 * OPEN_SHARDS  # of a reader: at the end of an epoch, windows of the next one are read too


class MDSWriter:
    """Appends samples to shards in `out`, an existing directory; `close` (or leaving `with`) writes the index.

    columns: name -> encoding. size_limit: bytes of a shard before compression; a sample larger than that gets a shard
    of its own. compression: a name that compression.py has. hashes: names of algorithms, stored in the index for each
    file.
    """

    def __init__(
        self,
        out: Path,
        columns: Mapping[str, str],
        *,
        size_limit: int = ShardsConfig.size_limit,
        compression: str | None = None,
        hashes: tuple[str, ...] = ("sha256",),
    ) -> None:
        self._suffix = parse(compression)[0] if compression is not None else None
        self._out = out
        self._columns = [(name, encoding(columns[name])) for name in sorted(columns)]
        self._config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": sorted(hashes),
            "size_limit": size_limit,
            "column_names": [name for name, _ in self._columns],
            "column_encodings": [columns[name] for name, _ in self._columns],
            "column_sizes": [kind.size for _, kind in self._columns],
        }
        self._header = json.dumps(self._config, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._start_shard()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append one sample: a value for every column.

        Raises InputError for missing or unknown columns and for values that their encoding cannot hold.
        """
        if set(sample) != set(self._config["column_names"]):
            raise InputError(f"a sample has columns {sorted(sample)}, the shard {self._config['column_names']}")
        values = [kind.encode(sample[name]) for name, kind in self._columns]
        sizes = [len(v) for v, (_, kind) in zip(values, self._columns, strict=True) if kind.size is None]
        data = np.array(sizes, "<u4").tobytes() + b"".join(values)
        if self._samples and self._num_bytes + len(data) + 4 > self._config["size_limit"]:
            self._finish_shard()
        self._samples.append(data)
        self._num_bytes += len(data) + 4

    def close(self) -> None:
        """Write the last shard and the index."""
        if self._samples:
            self._finish_shard()
        index = {"version": 2, "shards": self._shards}
        (self._out / INDEX).write_text(json.dumps(index, sort_keys=True), encoding="utf-8")

    def __enter__(self) -> "MDSWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # no index after an error: shards without one are not a data set
            self.close()

    def _start_shard(self) -> None:
        self._samples: list[bytes] = []
        self._num_bytes = 8 + len(self._header)

    def _finish_shard(self) -> None:
        lengths = [8 + 4 * len(self._samples) + len(self._header), *map(len, self._samples)]
        offsets = np.cumsum(lengths)
        if offsets[-1] >= 1 << 32:
            raise InputError(f"a shard of {offsets[-1]} bytes is too large: offsets are uint32; lower size_limit")
        count = np.array([len(self._samples)], "<u4")
        raw = b"".join([count.tobytes(), offsets.astype("<u4").tobytes(), self._header, *self._samples])
        name = f"shard.{len(self._shards):05}.mds"
        files: dict[str, Any] = {"raw_data": self._describe(name, raw), "zip_data": None}
        if self._suffix:
            name, raw = f"{name}.{self._suffix}", compress(self._config["compression"], raw)
            files["zip_data"] = self._describe(name, raw)
        (self._out / name).write_bytes(raw)
        self._shards.append({"samples": len(self._samples), **files, **self._config})
        self._start_shard()

    def _describe(self, name: str, data: bytes) -> dict[str, Any]:
        hashes = {algorithm: digest(algorithm, data) for algorithm in self._config["hashes"]}
        return {"basename": name, "bytes": len(data), "hashes": hashes}


class MDSReader:
    """Random access to a directory of shards: `len(reader)`, `reader[i]` -> {column: value}.

    Shards are mapped into memory, so that only the touched pages are read, and arrays are read-only views of the map.
    A shard's size and hashes are checked when it is opened; few are open at a time. Compressed shards are unpacked into
    unnamed temporary files. With `files`, only the index lies in `path`, and shards come from a cache of a remote
    directory. Threads may share a reader.

    Raises InputError when `path` has no index or one that cannot be read here, Failure (from `reader[i]`) when
    a shard is missing or damaged.
    """

    def __init__(self, path: Path, files: ShardFiles | None = None) -> None:
        self._path, self._files = path, files
        try:
            data = (path / INDEX).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path} is not a directory of shards: it has no {INDEX}") from None
        except OSError as problem:
            raise InputError(f"{path / INDEX} cannot be read ({problem.strerror}); change its permissions") from None
        self._shards = read_index(data, str(path / INDEX))
        counts = [shard["samples"] for shard in self._shards]
        self._columns = [_columns(path, shard) for shard in self._shards]
        self.samples_per_shard: list[int] = counts
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._open: dict[int, tuple[memoryview, np.ndarray[Any, Any]]] = {}  # in order of use
        self._lock = threading.Lock()  # over _open

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        data, offsets = self._opened(shard)
        at = i - int(self._ends[shard])  # negative: counted from the shard's end
        try:
            return _decode(self._columns[shard], data[int(offsets[at - 1]) : int(offsets[at])])
        except (ValueError, LookupError, ArithmeticError, RecursionError) as problem:  # where no hash was kept
            file = self._file(self._shards[shard]["raw_data"])
            raise Failure(f"{file} is damaged: sample {i} cannot be read: {problem}") from None

    @property
    def column_names(self) -> set[str]:
        """Columns that all shards have."""
        return (
            set.intersection(*({name for name, _ in columns} for columns in self._columns)) if self._columns else set()
        )

    @property
    def largest_file(self) -> int:
        """Bytes of the largest shard file."""
        return max((stored(shard)["bytes"] for shard in self._shards), default=0)

    def shard_of(self, samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The shard that each sample lies in. [n] -> [n]"""
        return np.searchsorted(self._ends, samples, side="right")

    def stored(self, shard: int) -> dict[str, Any]:
        """What the index says of a shard's file as it lies in its directory: `basename`, `bytes`, `hashes`."""
        return stored(self._shards[shard])

    def _opened(self, shard: int) -> tuple[memoryview, np.ndarray[Any, Any]]:
        """A shard's bytes and its samples' offsets. Before another is opened, what is too much is closed, or evicted: a
        file without a name takes its place on the disk until nobody maps it."""
        with self._lock:
            if shard in self._open:
                if self._files is not None:
                    self._files.touch(self.stored(shard))
                self._open[shard] = self._open.pop(shard)
            else:
                for old in list(self._open):
                    evicted = self._files is not None and not self._files.holds(self.stored(old))
                    if evicted or len(self._open) >= MAX_OPEN_SHARDS:
                        del self._open[old]
                self._open[shard] = self._load(self._shards[shard])
            return self._open[shard]

    def _load(self, shard: Mapping[str, Any]) -> tuple[memoryview, np.ndarray[Any, Any]]:
        raw, packed = shard["raw_data"], shard["zip_data"]
        unpacked = self._files is None and self._file(raw).exists()  # MosaicML's reader leaves them beside or instead
        if packed is None or unpacked:
            data = self._map(raw)
        else:
            data = _unpack(self._file(packed), self._map(packed), shard["compression"], raw["bytes"])
            self._check(raw, data)
        count = shard["samples"]
        offsets = np.frombuffer(data, "<u4", count + 1, 4).astype(np.int64) if len(data) >= 8 + 4 * count else None
        if (
            offsets is None
            or int.from_bytes(data[:4], "little") != count
            or offsets[-1] != len(data)
            or offsets[0] < 8 + 4 * count
            or np.any(np.diff(offsets) < 0)
        ):
            raise Failure(f"{self._file(raw)} is damaged: its header does not fit its size or the index")
        return data, offsets

    def _file(self, info: Mapping[str, Any]) -> Path:
        name = PurePosixPath(info["basename"])
        if name.is_absolute() or ".." in name.parts:
            raise Failure(f"{self._path / INDEX} names {info['basename']!r}, which lies outside of its directory")
        return self._path / name

    def _map(self, info: Mapping[str, Any]) -> memoryview:
        if self._files is not None:
            return self._files.map(info)
        try:
            with self._file(info).open("rb") as file:
                data = mapped(file)
        except FileNotFoundError:
            raise Failure(f"{self._file(info)} is missing") from None
        except OSError as problem:
            raise Failure(f"{self._file(info)} cannot be read: {problem.strerror}") from None
        self._check(info, data)
        return data

    def _check(self, info: Mapping[str, Any], data: memoryview) -> None:
        if what := damage(info, data):
            raise Failure(f"{self._file(info)} is damaged: {what}")


def _columns(path: Path, shard: Mapping[str, Any]) -> list[tuple[str, Any]]:
    columns = []
    for name, kind, size in zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True):
        try:
            found = encoding(kind)
        except ValueError as problem:
            raise InputError(f"{path}, column {name!r}: {problem}") from None
        if found.size != size:
            raise InputError(f"{path}, column {name!r}: {kind} takes {found.size} bytes, the index says {size}")
        columns.append((name, found))
    return columns


def _decode(columns: list[tuple[str, Any]], data: memoryview) -> dict[str, Any]:
    variable = sum(kind.size is None for _, kind in columns)
    sizes = iter(np.frombuffer(data, "<u4", variable).tolist())
    sample, at = {}, 4 * variable
    for name, kind in columns:
        end = at + (next(sizes) if kind.size is None else kind.size)
        sample[name] = kind.decode(data[at:end])
        at = end
    if at != len(data):
        raise ValueError(f"its columns take {at} bytes of {len(data)}")
    return sample


def _unpack(file: Path, data: memoryview, compression: str | None, num_bytes: int) -> memoryview:
    with tempfile.TemporaryFile() as unpacked:  # pages of a file can be dropped and read again; memory cannot
        try:
            for piece in decompress(str(compression), data, num_bytes):
                unpacked.write(piece)
        except InputError as problem:
            raise InputError(f"{file}: {problem}") from None
        except ValueError as problem:
            raise Failure(f"{file} is damaged: {problem}") from None
        if not 0 < num_bytes == unpacked.tell():
            raise Failure(f"{file} is damaged: it does not unpack to the {num_bytes} bytes that the index says")
        unpacked.flush()
        return memoryview(mmap.mmap(unpacked.fileno(), 0, access=mmap.ACCESS_READ))
