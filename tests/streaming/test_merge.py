"""Claims about merged indexes, against the data sets that they join. MosaicML's own bytes: tests/interop."""

import json
import shutil
from pathlib import Path

import pytest

from gristmill.errors import Failure, InputError
from gristmill.streaming import MDSReader, MDSWriter, merge
from gristmill.streaming.index import INDEX


def write(out: Path, numbers: range, columns: dict[str, str] | None = None, compression: str | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with MDSWriter(out, columns or {"n": "int"}, size_limit=260, compression=compression) as writer:
        for n in numbers:
            writer.write({"n": n})


def numbers(folder: Path) -> list[int]:
    reader = MDSReader(folder)
    return [reader[i]["n"] for i in range(len(reader))]


def test_a_merged_index_reads_as_its_parts_in_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path / "b", range(20, 27))
    write(tmp_path / "a" / "x", range(10), compression="gz")
    write(tmp_path / "a" / "y" / "z", range(10, 20), compression="zstd:1")
    write(tmp_path / "empty", range(0))
    merge(tmp_path)
    assert numbers(tmp_path) == list(range(27))
    names = [shard["raw_data"]["basename"] for shard in json.loads((tmp_path / INDEX).read_text())["shards"]]
    assert len(names) == 5
    assert names[0] == "a/x/shard.00000.mds"
    (tmp_path / "b" / "shard.00000.mds").write_bytes(b"")
    with pytest.raises(Failure, match=r"b/shard\.00000\.mds is damaged"):
        numbers(tmp_path)


def test_merging_again_and_merging_merged_ones_changes_nothing(tmp_path: Path) -> None:
    for name, first in (("a/x", 0), ("a/y", 5), ("b", 10)):
        write(tmp_path / name, range(first, first + 5))
    merge(tmp_path)
    once = (tmp_path / INDEX).read_bytes()
    merge(tmp_path)
    assert (tmp_path / INDEX).read_bytes() == once
    merge(tmp_path / "a")
    merge(tmp_path)
    assert sorted(numbers(tmp_path)) == list(range(15))


def test_a_merged_data_set_can_be_moved(tmp_path: Path) -> None:
    write(tmp_path / "here" / "a", range(3))
    merge(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert numbers(tmp_path / "there") == [0, 1, 2]


def test_what_cannot_be_merged_is_named_and_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no directory of shards below"):
        merge(tmp_path)
    write(tmp_path / "a", range(3))
    write(tmp_path / "b", range(3), {"n": "int32"})
    with pytest.raises(InputError, match=r"b/index.json has columns \{'n': 'int32'\}, .*a/index.json \{'n': 'int'\}"):
        merge(tmp_path)
    (tmp_path / "b" / INDEX).write_text("{}")
    with pytest.raises(InputError, match="not an MDS index"):
        merge(tmp_path)
    assert not (tmp_path / INDEX).exists()
