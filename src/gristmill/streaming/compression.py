"""Compression of shard files by MosaicML Streaming's names: `zstd`, or `zstd:7` with a level.

gz and bz2 are Python's own; br, snappy and zstd come with pyarrow, which shards stored plainly do not need.
"""

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any

from gristmill.errors import InputError

# The levels that each has, and the one that is taken where none is named. The names are also the files' suffixes.
LEVELS = {
    "br": (range(12), 11),
    "bz2": (range(1, 10), 9),
    "gz": (range(10), 9),
    "snappy": (range(0), 0),
    "zstd": (range(1, 23), 3),
}
ARROW = {"br": "brotli", "snappy": "snappy", "zstd": "zstd"}  # pyarrow's names
PIECE = 1 << 18  # bytes unpacked at a time


def parse(compression: str) -> tuple[str, int]:
    """Name and level. Raises InputError for any that MosaicML does not have."""
    name, colon, named = compression.partition(":")
    levels, level = LEVELS.get(name, (range(0), 0))
    if name not in LEVELS or (colon and named not in map(str, levels)):
        known = ", ".join(f"{name}[:{all[0]}-{all[-1]}]" if all else name for name, (all, _) in LEVELS.items())
        raise InputError(f"compression={compression!r} must be one of {known}, or none")
    return name, int(named) if colon else level


def compress(compression: str, data: bytes) -> bytes:
    """The same bytes whenever it runs."""
    name, level = parse(compression)
    match name:
        case "gz":
            return gzip.compress(data, level, mtime=0)  # its header would hold the time of day
        case "bz2":
            return bz2.compress(data, level)
    import pyarrow as pa

    codec = pa.Codec(ARROW[name], compression_level=level if LEVELS[name][0] else None)
    return bytes(codec.compress(data, asbytes=True))


def decompress(compression: str, data: memoryview, num_bytes: int) -> Iterator[bytes]:
    """What should unpack to `num_bytes`, in pieces; of anything larger num_bytes + 1 bytes, and no more.

    Raises InputError for an unknown compression, ValueError where `data` is damaged.
    """
    name, _ = parse(compression)
    left = num_bytes + 1
    try:
        source = _open(name, data, num_bytes)
        while left > 0 and (piece := source.read(min(PIECE, left))):
            left -= len(piece)
            yield piece
    except (OSError, EOFError, ValueError, zlib.error) as problem:  # ValueError: also Arrow's own
        raise ValueError(str(problem)) from None


def _open(name: str, data: memoryview, num_bytes: int) -> Any:
    match name:
        case "gz":
            return gzip.open(io.BytesIO(data))
        case "bz2":
            return bz2.open(io.BytesIO(data))
    import pyarrow as pa

    if name != "snappy":
        return pa.CompressedInputStream(pa.BufferReader(data), ARROW[name])
    # It has no stream, but its length in front: room is made only where the index says the same.
    length = _leading_number(data)
    if length != num_bytes:
        raise ValueError(f"it says that it holds {length} bytes, the index {num_bytes}")
    return io.BytesIO(pa.Codec(name).decompress(data, decompressed_size=length, asbytes=True))


def _leading_number(data: memoryview) -> int:
    """Seven bits a byte, lowest first; the highest bit says that more follow."""
    number = 0
    for place, byte in enumerate(data[:5]):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number
    raise ValueError("it has no length in front")
