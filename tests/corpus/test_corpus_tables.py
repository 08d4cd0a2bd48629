"""The reader of documents: what it gives of whole, odd and damaged files, compared with the rows that were written."""

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.corpus import CorpusConfig, FilterConfig, SourceConfig, build_corpus, tables
from gristmill.corpus.tables import read_texts
from gristmill.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def text_of(seed: int, num_words: int = 40) -> str:
    chance = random.Random(seed)
    return " ".join("".join(chance.choices("abcdefghijklm", k=chance.randint(2, 9))) for _ in range(num_words))


TEXTS = [text_of(seed) for seed in range(20)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)).encode()


LINES = lines(TEXTS)


def zst(data: bytes, **parameters: int) -> bytes:
    names = {getattr(zstd.CompressionParameter, name): value for name, value in parameters.items()}
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1} | names)


def read(path: Path, data: bytes | None = None) -> tuple[list[str], dict[str, int]]:
    if data is not None:
        path.write_bytes(data)
    texts, drops = read_texts(path, "--documents")
    return texts, drops.counts()


def read_table(path: Path, column: pa.Array, **settings: object) -> tuple[list[str], dict[str, int]]:
    pq.write_table(pa.table({"text": column}), path, **settings)
    return read(path)


# ---- archives ------------------------------------------------------------------------------------------

SKIPPABLE = b"\x50\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"ignored"
HALVES = LINES[: len(lines(TEXTS[:10]))], LINES[len(lines(TEXTS[:10])) :]

WHOLE = {
    "zero-padded.gz": gzip.compress(LINES) + bytes(1000),
    "members.gz": b"".join(map(gzip.compress, HALVES)),
    "padded-members.gz": gzip.compress(HALVES[0]) + bytes(700) + gzip.compress(HALVES[1]),
    "frames.zst": b"".join(map(zst, HALVES)),
    "skippable.zst": SKIPPABLE + zst(HALVES[0]) + SKIPPABLE + zst(HALVES[1]) + SKIPPABLE,
    "streams.bz2": b"".join(map(bz2.compress, HALVES)),
    "streams.xz": b"".join(map(lzma.compress, HALVES)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_archive_of_several_parts_or_with_padding_gives_every_row(tmp_path, name):
    kind, suffix = name.split(".")
    assert read(tmp_path / f"{kind}.jsonl.{suffix}", WHOLE[name]) == (TEXTS, {})


def test_a_zstd_archive_with_the_longest_common_window_is_read(tmp_path):
    # A frame's header declares its window: compressing as a stream leaves the content's size out, so it is 2 GiB.
    compressor = zstd.ZstdCompressor(
        options={
            zstd.CompressionParameter.window_log: 31,
            zstd.CompressionParameter.enable_long_distance_matching: 1,
            zstd.CompressionParameter.hash_log: 10,
            zstd.CompressionParameter.ldm_hash_log: 10,
            zstd.CompressionParameter.chain_log: 10,
        }
    )
    data = compressor.compress(LINES, mode=zstd.ZstdCompressor.FLUSH_BLOCK) + compressor.flush()
    with pytest.raises(zstd.ZstdError):
        zstd.decompress(data)  # without the option: the window is above the limit of most readers
    assert read(tmp_path / "long.jsonl.zst", data) == (TEXTS, {})


DAMAGED = {
    "without-its-trailer.gz": gzip.compress(LINES)[:-5],
    "wrong-checksum.gz": gzip.compress(LINES)[:-8] + bytes(4) + gzip.compress(LINES)[-4:],
    "garbage-behind.gz": gzip.compress(LINES) + b"garbage",
    "wrong-checksum.zst": zst(LINES)[:-1] + bytes([zst(LINES)[-1] ^ 1]),
    "garbage-behind.zst": zst(LINES) + b"garbage",
    "cut-frame-behind.zst": zst(LINES) + zst(LINES)[:20],
    "wrong-footer.xz": lzma.compress(LINES)[:-12] + bytes(12),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_behind_the_last_row_takes_no_row_with_it_and_is_counted(tmp_path, name):
    kind, suffix = name.split(".")
    assert read(tmp_path / f"{kind}.jsonl.{suffix}", DAMAGED[name]) == (TEXTS, {"unreadable": 1})


@pytest.mark.parametrize("command", ["zcat", "zstdcat", "xzcat"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_archive_gives_the_rows_that_the_usual_tool_gives(tmp_path, command, damage):
    many = [text_of(seed) for seed in range(3000)]
    suffix, pack = {"zcat": ("gz", gzip.compress), "zstdcat": ("zst", zst), "xzcat": ("xz", lzma.compress)}[command]
    packed = bytearray(pack(lines(many)))
    place = len(packed) * 4 // 5
    packed[place:] = b"" if damage == "cut" else bytes(byte ^ 0xFF for byte in packed[place:])
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(packed)
    try:
        unpacked = subprocess.run([command, path], capture_output=True, check=False).stdout
    except FileNotFoundError:
        pytest.skip(f"{command} is not installed")
    expected = []
    for line in unpacked.split(b"\n"):
        try:
            expected.append(json.loads(line)["text"])
        except ValueError:
            break  # where the cut or the garbage begins
    texts, drops = read_texts(path, "--documents")
    assert len(expected) > 1000
    assert texts[: len(expected)] == expected
    assert drops.counts()["unreadable"] == 1


def test_the_bytes_of_an_archive_that_is_none_are_counted(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(LINES)
    for name in ("plain.jsonl.gz", "plain.jsonl.zst", "plain.jsonl.bz2", "plain.jsonl.xz", "plain.parquet"):
        (folder / name).write_bytes(LINES)
    _, drops = built(folder, tmp_path / "out")
    assert drops["unreadable"]["count"] == 5
    assert drops["unreadable"]["bytes"] == 5 * len(LINES)


# ---- JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n", "\n \t\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_rows_are_read_whatever_ends_the_lines(tmp_path, start, end):
    assert read(tmp_path / "rows.jsonl", (start + LINES.decode().replace("\n", end)).encode()) == (TEXTS, {})


def test_a_text_keeps_characters_that_other_readers_take_for_line_ends(tmp_path):
    texts = [f"{text} \u2028 \x0c \x85 \x1c {text}" for text in TEXTS]
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    assert read(tmp_path / "rows.jsonl", data) == (texts, {})


def test_a_row_is_lost_only_for_its_text_and_never_for_its_other_columns(tmp_path):
    odd = [
        f'{{"text": "{TEXTS[0]}", "n": {"9" * 9000}}}',  # more digits than Python converts
        f'{{"text": "{TEXTS[1]}", "n": [1e999, NaN, "\\ud800"], "\\ud800": null}}',
        f'{{"text": "{TEXTS[2]}", "html": "{"<p>" * 100_000}"}}',
    ]
    bad = [
        '{"text": ' + "9" * 9000 + "}",
        '{"text": null}',
        '{"text": ["a"]}',
        "{}",
        "[1]",
        "{",
        "[" * 50_000,
        "\0" * 99,
    ]
    data = "\n".join([*odd, *bad]).encode() + b'\n{"text": "caf\xe9"}\n{"text": "a\\u0000b"}'
    assert read(tmp_path / "rows.jsonl", data) == (
        TEXTS[:3],
        {"no_text": 4, "not_json": 4, "not_utf8": 1, "binary": 1},
    )


def built(path: Path, out: Path, filters: FilterConfig | None = None, **changes: object) -> tuple[list[dict], dict]:
    """The documents and the drops of a corpus that is made of one path."""
    source = SourceConfig(**({"path": str(path), "license": "MIT"} | changes))
    out.mkdir()
    build_corpus(CorpusConfig(sources={"s": source}, filters=filters or FilterConfig()), out)
    rows = [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return rows, json.loads((out / "drops.json").read_text())


@pytest.mark.parametrize("ascii", [True, False])
def test_the_limit_applies_to_the_text_and_not_to_its_row(tmp_path, ascii):
    texts = [text_of(seed, 30) + " \U0001f33e\U0001f33b" * 60 for seed in range(9)]
    limit = max(len(text.encode()) for text in texts)
    rows = [{"raw": "x" * 9 * limit, "text": text} for text in [*texts, text_of(99, 30) + "long " * limit]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows))
    found, drops = built(path, tmp_path / "out", FilterConfig(max_bytes=limit, max_repeated_share=1))
    assert sorted(row["text"] for row in found) == sorted(texts)
    assert drops["too_long"]["count"] == 1


def test_the_limit_applies_to_the_text_after_line_ends_are_unified(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    texts = [text_of(seed).replace(" ", "\n") for seed in range(9)]
    limit = max(map(len, texts))
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (folder / "long.txt").write_bytes(b"x\n" * limit)
    found, drops = built(folder, tmp_path / "out", FilterConfig(max_bytes=limit))
    assert sorted(row["text"] for row in found) == sorted(texts)
    assert {reason: entry["count"] for reason, entry in drops.items()} == {"too_long": 1}


def test_a_line_that_does_not_fit_into_memory_is_counted_with_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "OTHER_COLUMNS_BYTES", 100_000)
    monkeypatch.setattr(tables, "MAX_TEXT_BYTES", 1000)
    wide = json.dumps({"html": "x" * 300_000, "text": TEXTS[0]}).encode()
    texts, drops = read(tmp_path / "rows.jsonl", wide + b"\n" + LINES)
    assert (texts, drops) == (TEXTS, {"row_too_long": 1})
    _, counted = read_texts(tmp_path / "rows.jsonl", "--documents")
    assert counted.reasons["row_too_long"]["bytes"] == len(wide) + 1


# ---- Parquet -------------------------------------------------------------------------------------------

KINDS = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_text_column_gives_the_same_texts(tmp_path, kind):
    column = pa.array(TEXTS).cast(getattr(pa, kind)())
    assert read_table(tmp_path / "rows.parquet", column) == (TEXTS, {})


@pytest.mark.parametrize("values", [pa.array(TEXTS), pa.array(TEXTS).cast(pa.binary())])
def test_a_dictionary_of_texts_gives_its_texts(tmp_path, values):
    assert read_table(tmp_path / "rows.parquet", values.dictionary_encode()) == (TEXTS, {})


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_one_cell_that_is_not_utf8_costs_one_document(tmp_path, kind):
    cells = [text.encode() for text in TEXTS]
    cells[6] = b"caf\xe9 " * 30
    column = pa.array(cells, pa.large_binary() if kind.startswith("large") else pa.binary())
    texts, drops = read_table(tmp_path / "rows.parquet", column.view(getattr(pa, kind)()))
    assert (texts, drops) == (TEXTS[:6] + TEXTS[7:], {"not_utf8": 1})


def test_empty_cells_are_counted_and_a_column_of_another_type_is_named(tmp_path):
    assert read_table(tmp_path / "some.parquet", pa.array([*TEXTS, None, ""])) == (
        TEXTS,
        {"no_text": 1, "too_short": 1},
    )
    with pytest.raises(InputError, match=r"^--documents: .*null\.parquet holds no text \(no_text: 2"):
        read_table(tmp_path / "null.parquet", pa.array([None, None]))
    for number, column in enumerate((pa.array([1]), pa.array([["a"]]), pa.array([{"a": "b"}]))):
        with pytest.raises(InputError, match=r"^--documents: column 'text' of .* holds .*, not text; name a column"):
            read_table(tmp_path / f"{number}.parquet", column)
    pq.write_table(pa.table([pa.array(TEXTS)] * 2, names=["text", "text"]), tmp_path / "two.parquet")
    with pytest.raises(InputError, match="has 2 columns 'text'"):
        read(tmp_path / "two.parquet")


def test_a_damaged_row_group_is_counted_in_documents_and_takes_no_other_with_it(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=6)
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    assert read(path, bytes(data)) == (TEXTS[:6] + TEXTS[12:], {"unreadable": 6})
    found, drops = built(path, tmp_path / "out")
    assert len(found) + drops["unreadable"]["count"] == len(TEXTS)
    assert drops["unreadable"]["examples"][0]["id"] == "rows.parquet#6"


ABSURD = {
    "dates": pa.array([10**8 + n % 4 for n in range(20)], pa.int32()).view(pa.date32()),
    "times": pa.array([2**50 + n % 4 for n in range(20)], pa.int64()).view(pa.timestamp("s")),
    "negative": pa.array([-(2**62) + n % 4 for n in range(20)], pa.int64()).view(pa.timestamp("us")),
    "zone": pa.array([n % 4 for n in range(20)], pa.int64()).view(pa.timestamp("us", tz="No/Where")),
    "names": pa.array([b"\xff%d" % (n % 4) for n in range(20)], pa.binary()).view(pa.string()),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_values_that_python_cannot_hold_still_tell_groups_apart(tmp_path, kind):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": TEXTS, "group": ABSURD[kind], "other": ABSURD["dates"]}), path)
    found, drops = built(path, tmp_path / "out", group_field="group")
    groups: dict[str, set[int]] = {}
    for row in found:
        groups.setdefault(row["group"], set()).add(TEXTS.index(row["text"]) % 4)
    assert (len(found), drops) == (20, {})
    assert sorted(map(sorted, groups.values())) == [[0], [1], [2], [3]]


def test_a_column_whose_name_has_a_dot_is_read(tmp_path):
    pq.write_table(pa.table({"meta.text": TEXTS, "meta": [{"text": 1}] * 20}), tmp_path / "rows.parquet")
    found, _ = built(tmp_path / "rows.parquet", tmp_path / "out", text_field="meta.text")
    assert sorted(row["text"] for row in found) == sorted(TEXTS)


# ---- columns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
@pytest.mark.parametrize("field", ["license_field", "group_field", "text_field"])
def test_a_misspelled_column_is_named_with_those_that_are_there(tmp_path, name, field):
    rows = [{"text": text, "license": "MIT", "repo": f"r{n % 3}"} for n, text in enumerate(TEXTS)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    changes = {"license": None if field == "license_field" else "MIT", field: "licence"}
    with pytest.raises(
        InputError, match=rf"^corpus\.sources\.s\.{field}: .* has no column 'licence'; it has text, license, repo$"
    ):
        built(path, tmp_path / "out", **changes)


def test_a_column_that_only_some_rows_have_is_no_mistake(tmp_path):
    rows = [{"text": text} | ({"license": "MIT"} if n % 2 else {}) for n, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, drops = built(tmp_path / "rows.jsonl", tmp_path / "out", license=None, license_field="license")
    assert (len(found), drops["license:unknown"]["count"]) == (10, 10)


def test_a_text_file_next_to_tables_has_no_license_of_its_own(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": t, "license": "MIT"}) + "\n" for t in TEXTS))
    (folder / "README.md").write_text(text_of(99))
    found, drops = built(folder, tmp_path / "out", license=None, license_field="license")
    assert len(found) == 20
    assert drops["license:unknown"]["examples"][0]["id"] == "README.md"


@pytest.mark.parametrize(("field", "fix"), [("license_field", "give license instead"), ("group_field", "leave it out")])
def test_a_column_of_files_that_have_none_is_refused(tmp_path, field, fix):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text(TEXTS[0])
    changes = {"license": None if field == "license_field" else "MIT", field: "x"}
    with pytest.raises(InputError, match=rf"^corpus\.sources\.s\.{field}: .* holds no \.jsonl or .*; {fix}$"):
        built(tmp_path / "docs", tmp_path / "out", **changes)


# ---- one text ------------------------------------------------------------------------------------------


def test_a_text_is_decoded_as_in_a_corpus_and_a_file_without_text_is_refused(tmp_path):
    assert read(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree") == (["one\ntwo\nthree"], {})
    for name, data, reason in (
        ("latin.txt", b"caf\xe9", r"not_utf8: 1, e\.g\. latin\.txt"),
        ("empty.txt", b"", "too_short: 1"),
        ("empty.jsonl", b"\n\n", "it is empty"),
        ("other.jsonl", b'{"body": "x"}', "has no column 'text'; it has body"),
    ):
        with pytest.raises(InputError, match=rf"^--documents: .*{reason}"):
            read(tmp_path / name, data)
    with pytest.raises(InputError, match=r"^--documents: .*unreadable: 1, e\.g\. absent\.txt \(.*No such file"):
        read(tmp_path / "absent.txt")
    with pytest.raises(InputError, match=r"^--documents: .*Is a directory"):
        read(tmp_path)
