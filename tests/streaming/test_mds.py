"""Claims about shard files, against a reader written here from the format alone and files that MosaicML wrote.

fixtures/mosaicml was written by mosaicml-streaming 0.13.0's MDSWriter from `mosaicml_rows` below.
"""

import contextlib
import json
import math
import re
import shutil
import struct
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gristmill.errors import Failure, InputError
from gristmill.streaming import MDSReader, MDSWriter
from gristmill.streaming.compression import LEVELS

MOSAICML = Path(__file__).parent / "fixtures" / "mosaicml"
MOSAICML_COLUMNS = {
    "text": "str",
    "raw": "bytes",
    "count": "int",
    "small": "uint8",
    "half": "float16",
    "ratio": "float64",
    "meta": "json",
    "free": "ndarray",
    "typed": "ndarray:int32",
    "fixed": "ndarray:uint16:2,3",
}
FREE_TYPES = ("uint8", "int8", "uint64", "float32", "int16", "float16", "uint32")


def mosaicml_rows() -> Iterator[dict[str, Any]]:
    for i, free in enumerate(FREE_TYPES):
        yield {
            "text": "grain é🌾" * i,
            "raw": bytes(range(i)),
            "count": -i * 10**15,
            "small": i,
            "half": np.float16(i / 4),
            "ratio": i / 7,
            "meta": {"i": [i, None, "é"]},
            "free": np.arange(1, i + 2, dtype=free),
            "typed": np.arange(i * 100 + 4, dtype=np.int32).reshape(2, -1)[:, : 300 // (i + 1) + 1].copy(),
            "fixed": np.full((2, 3), i * 999, np.uint16),
        }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float | np.floating):
        return a == b or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


# ---- a second reader, as plain as the format ----


def naive_array(encoding: str, data: bytes) -> np.ndarray[Any, Any]:
    parts = encoding.split(":")
    if len(parts) == 1:
        codes = {
            8: "u1",
            9: "i1",
            16: "u2",
            17: "i2",
            18: "f2",
            32: "u4",
            33: "i4",
            34: "f4",
            64: "u8",
            65: "i8",
            66: "f8",
        }
        dtype, data = np.dtype(codes[data[0]]), data[1:]
    else:
        dtype = np.dtype(parts[1])
    if len(parts) == 3:
        return np.frombuffer(data, dtype).reshape([int(n) for n in parts[2].split(",")])
    axes, width = divmod(data[0], 4)
    lengths = struct.unpack_from("<" + "BHIQ"[width] * axes, data, 1)
    return np.frombuffer(data[1 + axes * 2**width :], dtype).reshape(lengths)


def naive_value(encoding: str, data: bytes) -> Any:
    formats = {"int": "q", "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"}
    formats |= {"int64": "q", "uint64": "Q", "float16": "e", "float32": "f", "float64": "d"}
    if encoding == "str":
        return data.decode()
    if encoding == "json":
        return json.loads(data)
    if encoding.startswith("str_"):
        return {"str_int": int, "str_float": float, "str_decimal": Decimal}[encoding](data.decode())
    if encoding in formats:
        return struct.unpack("<" + formats[encoding], data)[0]
    return naive_array(encoding, data) if encoding.startswith("ndarray") else data


def naive_read(path: Path) -> Iterator[dict[str, Any]]:
    index = json.loads((path / "index.json").read_text())
    assert index["version"] == 2
    for shard in index["shards"]:
        data = (path / shard["raw_data"]["basename"]).read_bytes()
        (count,) = struct.unpack_from("<I", data)
        offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
        header = json.loads(data[4 + 4 * (count + 1) : offsets[0]])
        assert count == shard["samples"]
        assert offsets[-1] == len(data) == shard["raw_data"]["bytes"]
        assert header == {k: v for k, v in shard.items() if k not in ("samples", "raw_data", "zip_data")}
        for begin, end in pairwise(offsets):
            sample, at = {}, begin
            sizes = list(header["column_sizes"])
            for column, size in enumerate(sizes):
                if size is None:
                    (sizes[column],) = struct.unpack_from("<I", data, at)
                    at += 4
            for name, encoding, size in zip(header["column_names"], header["column_encodings"], sizes, strict=True):
                sample[name] = naive_value(encoding, data[at : at + size])
                at += size
            assert at == end
            yield sample


# ---- round trips ----

WIDTHS = {"uint": (8, 16, 32, 64), "int": (8, 16, 32, 64), "float": (16, 32, 64)}
ARRAY_TYPES = st.sampled_from([f"{kind}{bits}" for kind, widths in WIDTHS.items() for bits in widths])
SHAPES = hnp.array_shapes(max_dims=4, max_side=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(),
    "bytes": st.binary(),
    "int": st.integers(-(2**63), 2**63 - 1),
    "json": JSON,
    "str_int": st.integers(),
    "str_float": st.floats(),
    "str_decimal": st.decimals(allow_nan=False),
}


@st.composite
def columns(draw: st.DrawFn) -> tuple[str, st.SearchStrategy[Any]]:
    """An encoding and a strategy for its values."""
    kind = draw(st.sampled_from(["scalar", "free", "typed", "fixed", *PLAIN]))
    dtype, shape = draw(ARRAY_TYPES), draw(SHAPES)
    match kind:
        case "scalar":
            return dtype, hnp.from_dtype(np.dtype(dtype)).map(lambda value: value.item())
        case "free":
            return "ndarray", ARRAY_TYPES.flatmap(lambda name: hnp.arrays(name, SHAPES))
        case "typed":
            return f"ndarray:{dtype}", hnp.arrays(dtype, SHAPES)
        case "fixed":
            return f"ndarray:{dtype}:{','.join(map(str, shape))}", hnp.arrays(dtype, shape)
    return kind, PLAIN[kind]


@settings(max_examples=50)
@given(data=st.data(), compression=st.sampled_from([None, *LEVELS]), size_limit=st.sampled_from([1, 700, 1 << 20]))
def test_what_is_written_is_read_back_here_and_by_a_naive_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, compression: str | None, size_limit: int
) -> None:
    kinds = data.draw(st.dictionaries(st.text("abcxyzé_", min_size=1, max_size=3), columns(), min_size=1, max_size=4))
    rows = data.draw(st.lists(st.fixed_dictionaries({name: values for name, (_, values) in kinds.items()}), max_size=6))
    path = tmp_path_factory.mktemp("mds")
    encodings = {name: encoding for name, (encoding, _) in kinds.items()}
    with MDSWriter(path, encodings, size_limit=size_limit, compression=compression) as writer:
        for row in rows:
            writer.write(row)
    reader = MDSReader(path)
    found = [reader[i] for i in range(len(reader))]
    assert all(same(a[name], row[name]) for a, row in zip(found, rows, strict=True) for name in kinds)
    if compression is None:
        naive = list(naive_read(path))
        assert all(same(a[name], row[name]) for a, row in zip(naive, rows, strict=True) for name in kinds)


@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_files_written_by_mosaicml_are_read(kind: str) -> None:
    reader = MDSReader(MOSAICML / kind)
    rows = list(mosaicml_rows())
    assert len(reader) == len(rows)
    for i in (3, 0, 6, 1, 2, 5, 4):
        found = reader[i]
        assert all(same(found[name], rows[i][name]) for name in rows[i])


def test_our_bytes_equal_mosaicmls_for_the_same_samples(tmp_path: Path) -> None:
    with MDSWriter(tmp_path, MOSAICML_COLUMNS, size_limit=2500, hashes=("sha256", "xxh64")) as writer:
        for row in mosaicml_rows():
            writer.write(row)
    expected = MOSAICML / "plain"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in expected.iterdir())
    for file in expected.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_shards_stay_below_their_limit_and_read_in_order(tmp_path: Path) -> None:
    with MDSWriter(tmp_path, {"n": "int", "pad": "bytes"}, size_limit=2000) as writer:
        for n in range(200):
            writer.write({"n": n, "pad": bytes(n % 90)})
    sizes = [file.stat().st_size for file in tmp_path.glob("*.mds")]
    assert len(sizes) > 5
    assert max(sizes) <= 2000
    reader = MDSReader(tmp_path)
    assert [reader[n]["n"] for n in range(len(reader))] == list(range(200))
    with pytest.raises(IndexError):
        reader[200]


# ---- what is refused, and damage ----


def copy(kind: str, to: Path) -> Path:
    return Path(shutil.copytree(MOSAICML / kind, to / kind))


def patch_index(path: Path, **changes: Any) -> None:
    index = json.loads((path / "index.json").read_text())
    index["shards"][0] |= changes
    (path / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("kind", "named"), [("plain", "sha256"), ("zstd", "sha1")])
def test_one_flipped_bit_is_found_and_the_file_and_hash_named(tmp_path: Path, kind: str, named: str) -> None:
    path = copy(kind, tmp_path)
    file = next(path.glob("shard.00000.*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    reader = MDSReader(path)
    with pytest.raises(Failure, match=rf"{file.name} is damaged: its {named}"):
        reader[0]
    if kind == "plain":
        assert reader[6]["small"] == 6  # in another shard


def test_xxhash_alone_finds_a_flipped_bit(tmp_path: Path) -> None:
    with MDSWriter(tmp_path, {"n": "int"}, hashes=("xxh64",)) as writer:
        writer.write({"n": 1})
    file = tmp_path / "shard.00000.mds"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Failure, match="xxh64"):
        MDSReader(tmp_path)[0]


def test_missing_cut_and_misleading_shards_are_named(tmp_path: Path) -> None:
    path = copy("plain", tmp_path)
    (path / "shard.00001.mds").write_bytes(b"")
    (path / "shard.00002.mds").unlink()
    reader = MDSReader(path)
    with pytest.raises(Failure, match=r"shard.00001.mds is damaged: it has 0 bytes"):
        reader[4]
    with pytest.raises(Failure, match=r"shard.00002.mds is missing"):
        reader[6]
    shard = (path / "shard.00000.mds").read_bytes()
    (path / "shard.00000.mds").write_bytes(struct.pack("<I", 999) + shard[4:])
    patch_index(path, raw_data={"basename": "shard.00000.mds", "bytes": len(shard), "hashes": {}})
    with pytest.raises(Failure, match="header"):
        MDSReader(path)[0]
    patch_index(path, raw_data={"basename": "../plain/shard.00000.mds", "bytes": len(shard), "hashes": {}})
    with pytest.raises(Failure, match="outside"):
        MDSReader(path)[0]


def test_pickled_columns_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs code"):
        MDSWriter(tmp_path, {"x": "pkl"})
    path = copy("plain", tmp_path)
    patch_index(path, column_encodings=["pkl", *list(MOSAICML_COLUMNS.values())[1:]])
    with pytest.raises(InputError, match=r"column 'count': encoding 'pkl' is refused: unpickling runs code"):
        MDSReader(path)


@pytest.mark.parametrize(
    ("encoding", "value"),
    [
        ("str", b"x"),
        ("bytes", "x"),
        ("int", 2**63),
        ("str_int", 1.0),
        pytest.param("str_int", 10**5000, id="too_many_digits"),
        ("str_float", 1),
        ("str_decimal", 1.5),
        ("uint8", -1),
        ("uint8", 1.5),
        ("float32", "one"),
        ("ndarray", np.zeros((2, 0))),
        ("ndarray", np.array(1)),
        ("ndarray", np.array([1 + 2j])),
        ("ndarray:uint16", np.zeros(2, np.uint32)),
        ("ndarray:uint16:2", np.zeros(3, np.uint16)),
        ("ndarray:uint16:2", [1, 2]),
    ],
)
def test_values_that_an_encoding_cannot_hold_are_refused(tmp_path: Path, encoding: str, value: Any) -> None:
    writer = MDSWriter(tmp_path, {"x": encoding})
    with pytest.raises(InputError):
        writer.write({"x": value})
    with pytest.raises(InputError, match="columns"):
        writer.write({"y": value})


@pytest.mark.parametrize(
    "encoding", ["", "jpeg", "ndarray:", "ndarray:complex64", "ndarray:uint8:0", "ndarray:uint8:2:3", "ndarrays"]
)
def test_unknown_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(InputError, match="encoding"):
        MDSWriter(tmp_path, {"x": encoding})


def test_other_formats_and_compressions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no index\.json"):
        MDSReader(tmp_path)
    path = copy("zstd", tmp_path)
    patch_index(path, compression="lz4")
    with pytest.raises(InputError, match=r"shard.00000.mds.zstd: compression='lz4' must be one of"):
        MDSReader(path)[0]
    patch_index(path, version=3)
    with pytest.raises(InputError, match="version 3"):
        MDSReader(path)
    (path / "index.json").write_text("[]")
    with pytest.raises(InputError, match="not an MDS index"):
        MDSReader(path)


def test_an_error_while_writing_leaves_no_index(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), MDSWriter(tmp_path, {"n": "int"}) as writer:
        writer.write({"n": 1})
        raise RuntimeError
    assert not (tmp_path / "index.json").exists()


def described(**changes: Any) -> dict[str, Any]:
    return {"raw_data": {"basename": "shard.00000.mds", "bytes": 1, "hashes": {}} | changes}


CHANGES: list[dict[str, Any]] = [
    *({"samples": wrong} for wrong in (0, -3, 5.5, "7", None, True, 2**70, [4])),
    *({"raw_data": wrong} for wrong in (None, [], "x", {}, {"basename": "a", "bytes": 1})),
    *(described(basename=wrong) for wrong in (None, 5, "a\0b")),
    *(described(bytes=wrong) for wrong in (None, -1, 1.5, "9", True)),
    *(described(hashes=wrong) for wrong in (None, ["sha256"], {"sha1": 5})),
    {"zip_data": {"basename": "a"}},
    {"compression": 7},
    {"format": None},
    {"column_names": 5},
    {"column_names": ["a", "a"]},
    {"column_encodings": ["str"]},
    {"column_sizes": [-1]},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_an_index_with_a_wrong_field_is_refused_and_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = copy("zstd", tmp_path)
    patch_index(path, **change)
    with pytest.raises(InputError, match=rf"{re.escape(str(path / 'index.json'))} "):
        MDSReader(path)


FIELDS = ("samples", "raw_data", "zip_data", "version", "format", "column_names", "column_encodings", "column_sizes")


@pytest.mark.parametrize("field", FIELDS)
def test_an_index_without_a_field_is_refused_and_the_field_named(tmp_path: Path, field: str) -> None:
    path = copy("plain", tmp_path)
    index = json.loads((path / "index.json").read_text())
    del index["shards"][-1][field]
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"index\.json is not an MDS index: .*{field}"):
        MDSReader(path)


@pytest.mark.parametrize(
    "text", ["", "5", '{"version": 2, "shards": 5}', '{"version": 2, "shards": [5]}', "[" * 99_999]
)
def test_an_index_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json is not an MDS index"):
        MDSReader(tmp_path)


@given(st.integers(0, 3), st.sampled_from(FIELDS), JSON)
def test_no_value_of_an_index_field_ends_in_anything_but_our_errors(
    tmp_path_factory: pytest.TempPathFactory, shard: int, field: str, value: Any
) -> None:
    path = copy("zstd", tmp_path_factory.mktemp("shards"))
    index = json.loads((path / "index.json").read_text())
    index["shards"][shard % len(index["shards"])][field] = value
    (path / "index.json").write_text(json.dumps(index))
    with contextlib.suppress(InputError, Failure):
        reader = MDSReader(path)
        for number in range(len(reader)):
            reader[number]
