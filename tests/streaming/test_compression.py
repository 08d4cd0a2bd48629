"""Claims about compressed shards: what comes back, damage, and files that unpack to more than they should.

That MosaicML reads and writes the same is tests/interop's.
"""

import contextlib
import json
import random
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.errors import Failure, InputError
from gristmill.streaming import MDSReader, MDSWriter
from gristmill.streaming.compression import LEVELS, PIECE, compress, decompress, parse
from gristmill.streaming.index import INDEX

ALL = sorted(LEVELS)
COLUMNS = {"text": "str", "meta": "json", "big": "str_int", "money": "str_decimal", "n": "int", "ids": "ndarray"}
ROWS = [
    {"big": 10 ** (9 * i), "ids": np.arange(i + 9), "meta": {"i": i}, "money": Decimal(i) / 8, "n": i, "text": "é" * i}
    for i in range(4)
]

READ = (2, 0, 3, 1)


def write(out: Path, compression: str, hashes: tuple[str, ...] = ("sha256",)) -> Path:
    """The rows in one shard; returns its file."""
    with MDSWriter(out, COLUMNS, compression=compression, hashes=hashes) as writer:
        for row in ROWS:
            writer.write(row)
    (file,) = out.glob("*.mds.*")
    return file


def read(folder: Path) -> list[str]:
    reader = MDSReader(folder)
    return [repr(reader[i]) for i in READ]


def patch(folder: Path, part: str, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["shards"][0][part] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ALL)
def test_every_level_comes_back_and_stands_in_the_index(tmp_path: Path, name: str) -> None:
    for compression in (name, *(f"{name}:{level}" for level in LEVELS[name][0])):
        file = write(tmp_path, compression)
        assert file.name == f"shard.00000.mds.{name}"
        assert json.loads((tmp_path / INDEX).read_text())["shards"][0]["compression"] == compression
        assert read(tmp_path) == [repr(ROWS[i]) for i in READ]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1])
def test_pieces_join_to_what_was_compressed(name: str, size: int) -> None:
    data = random.Random(size).randbytes(size // 9) + bytes(size - size // 9)
    assert b"".join(decompress(name, memoryview(compress(name, data)), size)) == data


def test_gzip_holds_no_time_and_zlib_reads_it() -> None:
    packed = compress("gz", b"grain" * 99)
    assert packed[4:8] == bytes(4)
    assert zlib.decompress(packed, wbits=31) == b"grain" * 99


@pytest.mark.parametrize(
    "compression", ["", "lz4", "zstd:", "zstd:0", "zstd:23", "zstd:07", "gz:10", "bz2:0", "snappy:1", "gz:-1"]
)
def test_other_compressions_and_levels_are_refused(tmp_path: Path, compression: str) -> None:
    with pytest.raises(InputError, match=r"compression=.* must be one of br\[:0-11\], bz2.*snappy"):
        parse(compression)
    with pytest.raises(InputError):
        MDSWriter(tmp_path, COLUMNS, compression=compression)


# ---- damage ----


@pytest.mark.parametrize("name", ALL)
def test_hashes_of_packed_and_of_unpacked_bytes_are_checked(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name)
    data = file.read_bytes()
    file.write_bytes(data[:40] + bytes([data[40] ^ 4]) + data[41:])
    with pytest.raises(Failure, match=f"{file.name} is damaged: its sha256"):
        read(tmp_path)
    file.write_bytes(data)
    patch(tmp_path, "raw_data", hashes={"md5": "0" * 32})
    with pytest.raises(Failure, match=r"shard\.00000\.mds is damaged: its md5"):
        read(tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_a_file_cut_anywhere_is_named(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, hashes=())
    data = file.read_bytes()
    for size in {*range(0, len(data), 9), *range(len(data) - 12, len(data))}:
        file.write_bytes(data[:size])
        patch(tmp_path, "zip_data", bytes=size)  # as if the writer had been cut
        with pytest.raises(Failure, match=f"{file.name} is damaged"):
            read(tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_flipped_bits_without_hashes_never_raise_anything_but_failure(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, hashes=())
    data, chance, said = file.read_bytes(), random.Random(0), []
    for place in range(0, len(data), 3):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
        try:
            read(tmp_path)
        except Failure as problem:
            said.append(str(problem))
    assert len(said) > len(data) / 9
    assert all("shard.00000.mds" in text for text in said)


@pytest.mark.parametrize("name", ALL)
def test_a_bomb_is_stopped_at_one_byte_more_than_the_index_says(tmp_path: Path, name: str) -> None:
    bomb = compress(name, bytes(5 * PIECE))
    made = 0
    with contextlib.suppress(ValueError):
        for piece in decompress(name, memoryview(bomb), 1000):
            made += len(piece)
    assert made == (0 if name == "snappy" else 1001)  # snappy says beforehand how much it is
    file = write(tmp_path, name, hashes=())
    file.write_bytes(bomb)
    patch(tmp_path, "zip_data", bytes=len(bomb))
    with pytest.raises(Failure, match=f"{file.name} is damaged"):
        read(tmp_path)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("said", [-5, 0, 1 << 60])
def test_an_index_that_says_impossible_sizes_takes_no_memory(tmp_path: Path, name: str, said: int) -> None:
    """A size that no shard can have is refused with the index, one that this shard does not have when it is read."""
    file = write(tmp_path, name, hashes=())
    patch(tmp_path, "raw_data", bytes=said)
    kind, message = (Failure, f"{file.name} is damaged") if said == 0 else (InputError, f"bytes of shard 0 is {said}")
    with pytest.raises(kind, match=message):
        read(tmp_path)
