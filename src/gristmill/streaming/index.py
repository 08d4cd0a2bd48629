"""The index of a directory of MDS shards, and the check of a shard file against it."""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from gristmill.errors import InputError

INDEX = "index.json"


def read_index(data: bytes, where: str) -> list[dict[str, Any]]:
    """Return the shards that an index lists, after checking their fields. `where` names the index in errors.

    Raises InputError for another format, and for a field that is missing or has a type or range that MDS forbids.
    """
    try:
        index = json.loads(data)
        shards: list[dict[str, Any]] = index["shards"]
        for version, form in [(index["version"], "mds"), *((s["version"], s["format"]) for s in shards)]:
            if (version, form) != (2, "mds"):
                raise InputError(f"{where} names {form} shards of version {version}; only mds version 2 is read")
        for number, shard in enumerate(shards):
            for name, value, holds in _fields(shard):
                if not holds:
                    raise InputError(f"{where} is not an MDS index: {name} of shard {number} is {value!r}")
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as problem:
        raise InputError(f"{where} is not an MDS index: {problem!r}") from None
    return shards


def _fields(shard: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Yield the name and value of each field that is read, and whether the value is allowed."""
    yield "samples", shard["samples"], _is_uint32(shard["samples"], 1)
    files = {"raw_data": shard["raw_data"]}
    if shard["zip_data"] is not None:
        files["zip_data"] = shard["zip_data"]
        yield "compression", shard["compression"], isinstance(shard["compression"], str)
    for name, file in files.items():
        yield f"{name}.basename", file["basename"], isinstance(file["basename"], str) and "\0" not in file["basename"]
        yield f"{name}.bytes", file["bytes"], _is_uint32(file["bytes"], 0)
        hashes = file["hashes"]
        yield f"{name}.hashes", hashes, isinstance(hashes, dict) and all(isinstance(v, str) for v in hashes.values())
    names, kinds, sizes = (shard[f"column_{field}"] for field in ("names", "encodings", "sizes"))
    yield "column_names", names, all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    yield "column_encodings", kinds, all(isinstance(kind, str) for kind in kinds) and len(kinds) == len(names)
    yield "column_sizes", sizes, all(s is None or _is_uint32(s, 0) for s in sizes) and len(sizes) == len(names)


def _is_uint32(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 32


def stored(shard: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `basename`, `bytes` and `hashes` of a shard's file as it is stored, compressed or not."""
    return dict(shard["zip_data"] or shard["raw_data"])


def mapped(file: BinaryIO) -> memoryview:
    """Map a file into memory for reading."""
    try:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:  # an empty file cannot be mapped
        return memoryview(b"")


def damage(info: Mapping[str, Any], data: memoryview) -> str | None:
    """Return what of a file's bytes does not match the index; None if all matches."""
    if len(data) != info["bytes"]:
        return f"it has {len(data)} bytes, the index says {info['bytes']}"
    for algorithm, expected in info["hashes"].items():
        if digest(algorithm, data) != expected:
            return f"its {algorithm} does not match the index"
    return None


def digest(algorithm: str, data: bytes | memoryview) -> str:
    """Return a hexadecimal hash by one of hashlib's algorithms, or xxhash's if that package is installed."""
    if algorithm in hashlib.algorithms_available and not algorithm.startswith("shake_"):
        return hashlib.new(algorithm, data).hexdigest()
    try:
        import xxhash
    except ImportError:
        raise InputError(f"hash {algorithm!r} is not in hashlib; one of xxhash's needs: pip install xxhash") from None
    if algorithm not in xxhash.algorithms_available:
        raise InputError(f"hash {algorithm!r} is neither in hashlib nor in xxhash")
    hasher: Callable[[bytes | memoryview], Any] = getattr(xxhash, algorithm)
    return str(hasher(data).hexdigest())
