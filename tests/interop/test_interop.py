"""Claims about MosaicML Streaming itself, beside ours: each reads what the other writes, with equal values and hashes.

Theirs runs in an environment of its own, which `make interop` builds: its requirements exclude ours.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from rows import COLUMNS, COMPRESSIONS, FEW_COLUMNS, SIZE_LIMIT, differences, folder_name, rows

from gristmill.streaming import MDSReader, MDSWriter, merge
from gristmill.streaming.index import INDEX

HERE = Path(__file__).parent
THEIR_PYTHON = HERE.parents[1] / ".interop" / "bin" / "python"
FIXTURES = HERE.parent / "streaming" / "fixtures" / "mosaicml-compressed"
# All that MosaicML takes of hashlib's and xxhash's.
HASHES = (
    *("blake2b", "blake2s", "md5", "sha1", "sha224", "sha256", "sha384", "sha512"),
    *("sha3_224", "sha3_256", "sha3_384", "sha3_512", "xxh128", "xxh32", "xxh3_128", "xxh3_64", "xxh64"),
)  # fmt: skip


def theirs(*command: str | Path) -> None:
    """Runs theirs.py; what it finds wrong fails the test."""
    if not THEIR_PYTHON.exists():
        if "interop" in os.environ.get("GRISTMILL_REQUIRE", "").split(","):
            pytest.fail("GRISTMILL_REQUIRE names interop, and .interop is missing: make interop")
        pytest.skip("not run: .interop is missing; make interop builds it")
    with tempfile.TemporaryDirectory() as temporary:  # it leaves its locks behind
        done = subprocess.run(
            [THEIR_PYTHON, HERE / "theirs.py", *command],
            env=os.environ | {"PYTHONPATH": str(HERE / "stub"), "TMPDIR": temporary},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-3000:]


def write(out: Path, compression: str | None, hashes: tuple[str, ...]) -> None:
    out.mkdir(parents=True)
    with MDSWriter(out, COLUMNS, size_limit=SIZE_LIMIT, compression=compression, hashes=hashes) as writer:
        for row in rows():
            writer.write(row)


def assert_holds_the_rows(folder: Path, columns: dict[str, str]) -> None:
    reader = MDSReader(folder)
    assert len(reader) == len(rows())
    for i, row in reversed(list(enumerate(rows()))):
        assert not differences(reader[i], {name: row[name] for name in columns}), f"{folder}, sample {i}"


@pytest.fixture(scope="module")
def written_by_them(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("theirs")
    theirs("write", out)
    return out


@pytest.mark.parametrize("folder", sorted(FIXTURES.iterdir()), ids=lambda folder: folder.name)
def test_compressed_files_that_mosaicml_wrote_are_read(folder: Path) -> None:
    assert_holds_the_rows(folder, FEW_COLUMNS)


def test_we_read_what_mosaicml_writes_in_every_encoding_compression_and_hash(written_by_them: Path) -> None:
    for compression in COMPRESSIONS:
        assert_holds_the_rows(written_by_them / folder_name(compression), COLUMNS)  # and checks all hashes


def test_mosaicml_reads_what_we_write_in_every_encoding_compression_and_hash(tmp_path: Path) -> None:
    for compression in COMPRESSIONS:
        write(tmp_path / folder_name(compression), compression, HASHES)
    write(tmp_path / "no-hash", None, ())
    theirs("read", *sorted(tmp_path.iterdir()))


def test_our_files_and_mosaicmls_are_the_same_bytes(written_by_them: Path, tmp_path: Path) -> None:
    write(tmp_path / "plain", None, HASHES)
    ours, expected = sorted((tmp_path / "plain").iterdir()), sorted((written_by_them / "plain").iterdir())
    assert [file.name for file in ours] == [file.name for file in expected]
    assert len(ours) > 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, expected, strict=True))


def test_merged_indexes_are_the_same_bytes_and_mosaicml_reads_them(tmp_path: Path) -> None:
    for name, compression in (("b", None), ("a-2", "gz"), ("a", "zstd")):
        write(tmp_path / "ours" / name, compression, ("sha1",))
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    merge(tmp_path / "ours")
    theirs("merge", tmp_path / "theirs")
    assert (tmp_path / "ours" / INDEX).read_bytes() == (tmp_path / "theirs" / INDEX).read_bytes()
    theirs("read", tmp_path / "ours")


def test_mosaicml_reads_an_index_merged_from_nested_directories(tmp_path: Path) -> None:
    for name in ("a/x", "b/x"):  # MosaicML's own merge would name both shards x/shard.00000.mds
        write(tmp_path / name, None, ("sha1",))
    merge(tmp_path)
    theirs("read", tmp_path)
