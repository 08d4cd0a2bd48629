"""The corpus stage on real folders, files, packages and datasets: what comes out, and what bad input does."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.artifact import Built
from gristmill.corpus import CorpusConfig, FilterConfig, SourceConfig, build_corpus, fingerprint
from gristmill.corpus.documents import DOCUMENTS
from gristmill.corpus.paths import groups_of
from gristmill.errors import InputError

SENTENCE = "the mill grinds grain into meal while water turns the wheel and stones wear slowly by day or night"
WORDS = SENTENCE.split()


def text_of(seed: int, num_words: int = 120) -> str:
    random_ = random.Random(seed)
    return "\n".join(" ".join(random_.choices(WORDS, k=12)) for _ in range(num_words // 12)) + "\n"


def notes(folder: Path, count: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"note-{number}.md").write_text(text_of(number))
    return folder


def config(path: Path | str, **changes: object) -> CorpusConfig:
    source = {"path": str(path), "license": "MIT"} | changes
    return CorpusConfig(sources={"notes": SourceConfig(**source)})


def build(cfg: CorpusConfig, out: Path) -> tuple[Built, pa.Table, dict]:
    out.mkdir()
    built = build_corpus(cfg, out)
    tables = [pq.read_table(out / f"documents-{split}.parquet") for split in ("train", "validation", "test")]
    drops = json.loads((out / "drops.json").read_text())
    assert {file.name for file in out.iterdir()} == {
        "drops.json", "documents-train.parquet", "documents-validation.parquet", "documents-test.parquet"
    }  # fmt: skip
    return built, pa.concat_tables(tables), drops


# ---- good input ----------------------------------------------------------------------------------------


def test_a_folder_of_markdown_becomes_three_splits_with_signals_and_figures(tmp_path):
    built, table, drops = build(config(notes(tmp_path / "notes")), tmp_path / "out")
    assert table.schema.equals(DOCUMENTS)
    assert sorted(table["text"].to_pylist()) == sorted(text_of(number) for number in range(8))
    assert table["num_bytes"].to_pylist() == [len(text.encode()) for text in table["text"].to_pylist()]
    assert table["num_lines"].to_pylist() == [10] * 8
    assert set(table["license"].to_pylist()) == {"MIT"}
    assert drops == {}
    splits = built.metrics["splits"]
    assert all(splits[split]["documents"] >= 1 for split in ("train", "validation", "test"))
    assert (
        sum(split["bytes"] for split in splits.values())
        == built.metrics["bytes"]
        == sum(table["num_bytes"].to_pylist())
    )
    source = built.sources["notes"]
    assert source["documents"] == 8
    assert source["licenses"] == {"MIT": built.metrics["bytes"]}
    assert source["fingerprint"] == fingerprint(config(tmp_path / "notes"))["notes"]


def test_a_second_build_gives_identical_bytes_whatever_the_order_of_the_sources(tmp_path):
    a, b = notes(tmp_path / "a"), notes(tmp_path / "b", 12)
    sources = {name: SourceConfig(path=str(path), license="MIT") for name, path in (("a", a), ("b", b))}
    hashes = []
    for out, names in ((tmp_path / "1", "ab"), (tmp_path / "2", "ba")):
        build(CorpusConfig(sources={name: sources[name] for name in names}), out)
        hashes.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()})
    assert hashes[0] == hashes[1]


def test_rows_are_sorted_and_groups_lie_in_one_split(tmp_path):
    for number in range(30):
        folder = tmp_path / "docs" / f"part {number % 6}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(text_of(number))
    (tmp_path / "out").mkdir()
    build_corpus(config(tmp_path / "docs"), tmp_path / "out")
    homes: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        rows = pq.read_table(tmp_path / "out" / f"documents-{split}.parquet").to_pylist()
        keys = [(row["source"], row["group"], row["id"]) for row in rows]
        assert keys == sorted(keys)
        for row in rows:
            homes.setdefault(row["group"], set()).add(split)
    assert len(homes) == 6
    assert all(len(splits) == 1 for splits in homes.values())


def test_groups_are_top_folders_or_files_when_there_are_too_few_of_those():
    flat = ["a.md", "b.md", "c.md"]
    assert groups_of(flat) == {name: name for name in flat}
    assert groups_of(["x/1", "x/2", "y/1", "z.md"]) == {"x/1": "x", "x/2": "x", "y/1": "y", "z.md": "z.md"}
    assert groups_of(["x/1", "x/2", "y/1"]) == {name: name for name in ("x/1", "x/2", "y/1")}


def rows_of(count: int = 9) -> list[dict]:
    return [{"text": text_of(n), "repo": f"repo {n % 3}", "lic": "MIT" if n % 2 else "GPL-3.0"} for n in range(count)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    match path.suffixes:
        case [".jsonl"]:
            path.write_bytes(lines)
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress(lines))
        case [".jsonl", ".zst"]:
            path.write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_every_table_format_gives_the_same_documents(tmp_path, name):
    path = write_rows(tmp_path / name, rows_of())
    _, table, _ = build(config(path, group_field="repo"), tmp_path / "out")
    found = {(row["text"], row["group"]) for row in table.to_pylist()}
    assert found == {(row["text"], row["repo"]) for row in rows_of()}


def test_a_license_column_decides_row_by_row(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows_of(), {"text": text_of(99)}])
    built, table, drops = build(config(path, license=None, license_field="lic"), tmp_path / "out")
    assert set(table["license"].to_pylist()) == {"MIT"}
    assert table.num_rows == 4
    assert built.metrics["dropped"] == {"license:GPL-3.0": 5, "license:unknown": 1}
    assert drops["license:GPL-3.0"]["examples"][0]["id"] == "rows.jsonl#0"


def test_a_local_hugging_face_dataset_is_read_offline(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    write_rows(tmp_path / "hub" / "train.jsonl", rows_of())
    datasets.Dataset.from_list(rows_of()).save_to_disk(str(tmp_path / "saved"))
    for kind in ("hub", "saved"):
        source = SourceConfig(dataset=str(tmp_path / kind), license="MIT", group_field="repo")
        cfg = CorpusConfig(sources={"rows": source})
        built, table, _ = build(cfg, tmp_path / f"out {kind}")
        assert sorted(table["text"].to_pylist()) == sorted(row["text"] for row in rows_of())
        assert built.sources["rows"]["fingerprint"] == fingerprint(cfg)["rows"] != ""
    with pytest.raises(InputError, match=r"corpus\.sources\.rows\.text_field: .* has no column 'body'; it has"):
        fingerprint(
            CorpusConfig(
                sources={"rows": SourceConfig(dataset=str(tmp_path / "saved"), license="MIT", text_field="body")}
            )
        )
    with pytest.raises(InputError, match=r"corpus\.sources\.rows\.dataset: .* could not be loaded"):
        fingerprint(CorpusConfig(sources={"rows": SourceConfig(dataset=str(tmp_path / "missing"), license="MIT")}))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "saved"])
def test_a_local_dataset_is_known_by_its_content_and_not_by_times(tmp_path, monkeypatch, kind):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    cfg = CorpusConfig(sources={"rows": SourceConfig(dataset=str(folder), license="MIT")})

    def write(first: int) -> dict[str, str]:
        rows = [{"text": text_of(first + n)} for n in range(9)]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if kind == "saved":
            datasets.Dataset.from_list(rows).save_to_disk(str(folder))
            for file in folder.glob("*.json"):  # the library's own mark of the content
                file.write_text(re.sub('"_fingerprint": "[^"]*"', '"_fingerprint": "same"', file.read_text()))
        else:
            write_rows(folder / f"train.{kind}", rows)
        set_times(0)
        return fingerprint(cfg)

    def set_times(seconds: int) -> None:
        for file in folder.iterdir():
            os.utime(file, (seconds, seconds))

    first, second = write(0), write(100)
    assert first != second
    _, table, _ = build(cfg, tmp_path / "out")
    assert sorted(table["text"].to_pylist()) == sorted(text_of(100 + n) for n in range(9))
    set_times(1_000_000)
    assert fingerprint(cfg) == second


# ---- duplicates ----------------------------------------------------------------------------------------


def test_near_copies_leave_their_longest_and_every_document_read_is_kept_or_counted(tmp_path):
    folder = notes(tmp_path / "notes")
    copy = text_of(3) + "one more line\n"
    (folder / "a copy.md").write_text(copy)
    (folder / "same.md").write_text(text_of(4).replace("\n", "\n\n"))
    (folder / "tiny.md").write_text("tiny")
    built, table, drops = build(config(folder), tmp_path / "out")
    assert built.metrics["dropped"] == {"duplicate": 1, "near_duplicate": 1, "too_short": 1}
    assert copy in table["text"].to_pylist()
    assert text_of(3) not in table["text"].to_pylist()
    near = drops["near_duplicate"]["examples"][0]
    assert (near["id"], near["duplicate_of"], near["source"]) == ("note-3.md", "a copy.md", "notes")
    assert near["excerpt"] == text_of(3)[:200]
    assert table.num_rows + sum(entry["count"] for entry in drops.values()) == len(list(folder.iterdir()))
    assert sum(table["num_bytes"].to_pylist()) + sum(entry["bytes"] for entry in drops.values()) == sum(
        file.stat().st_size for file in folder.iterdir()
    )


# ---- bad input -----------------------------------------------------------------------------------------


def test_bad_files_are_counted_drops_and_the_rest_goes_on(tmp_path):
    folder = notes(tmp_path / "notes")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 20)
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 40)
    (folder / "line.txt").write_bytes(b"x y " * 1_000_000)  # 4 MB on one line
    (folder / ".hidden.md").write_text(text_of(77))
    (folder / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    cfg = CorpusConfig(
        sources={"notes": SourceConfig(path=str(folder), license="MIT")}, filters=FilterConfig(max_bytes=2_000_000)
    )
    built, table, drops = build(cfg, tmp_path / "out")
    assert table.num_rows == 8
    assert built.metrics["dropped"] == {"binary": 1, "not_utf8": 1, "too_long": 1, "unreadable": 1}
    assert drops["unreadable"]["examples"][0]["id"] == "dangling"
    assert drops["too_long"]["bytes"] == 4_000_000
    assert len(drops["too_long"]["examples"][0]["excerpt"]) == 200


def test_bad_rows_are_counted_drops_with_their_line(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of())
    text = "a b " * 1_000_000
    long = json.dumps({"text": text})
    path.write_text(
        path.read_text()
        + f'{{"text": 5}}\nnot json\n[1]\n\n{long}\n{{"text": "{"half a pair " * 9}\\ud800"}}\n'
        + json.dumps(rows_of(10)[9])
    )
    cfg = CorpusConfig(
        sources={"rows": SourceConfig(path=str(path), license="MIT")}, filters=FilterConfig(max_bytes=1_000_000)
    )
    built, table, drops = build(cfg, tmp_path / "out")
    assert table.num_rows == 10  # those before the bad ones, and the one after
    assert built.metrics["dropped"] == {"no_text": 1, "not_json": 2, "not_utf8": 1, "too_long": 1}
    assert drops["too_long"]["bytes"] == len(text)


def test_a_damaged_archive_is_a_counted_drop(tmp_path):
    folder = notes(tmp_path / "notes")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"x" * 10_000)[:40])
    (folder / "rows.parquet").write_bytes(b"PAR1 and then nothing")
    built, _, _ = build(config(folder), tmp_path / "out")
    assert built.metrics["dropped"]["unreadable"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_a_counted_drop(tmp_path):
    folder = notes(tmp_path / "notes")
    (folder / "note-0.md").chmod(0)
    built, table, _ = build(config(folder), tmp_path / "out")
    assert built.metrics["dropped"] == {"unreadable": 1}
    assert table.num_rows == 7
    (folder / "note-0.md").chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_when_nothing_is_left_the_error_shows_what_was_dropped(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(b"\x89PNG\0" * 100)
    (folder / "read me").write_text("hi")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(
        InputError, match=r"corpus\.sources\.notes: no document is left(.|\n)*binary: 4 \(2,000 bytes\), e\.g\. 0\.png"
    ):
        build_corpus(config(folder), out)
    assert list(out.iterdir()) == []  # no spool stays behind


@pytest.mark.parametrize("call", [fingerprint, lambda cfg: build_corpus(cfg, Path("never written"))])
def test_sources_that_cannot_be_used_are_refused_with_their_setting(tmp_path, call):
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    notes(tmp_path / "notes")
    for cfg, message in (
        (config(tmp_path / "missing"), r"corpus\.sources\.notes\.path: .*missing' does not exist"),
        (config(tmp_path / "empty"), r"corpus\.sources\.notes\.path: .*empty' holds no files"),
        (config(tmp_path / "notes/*.txt"), r"corpus\.sources\.notes\.path: .* holds no files"),
        (config(tmp_path / "notes", license=None), r"corpus\.sources\.notes\.license: is missing; name"),
        (
            config(tmp_path / "notes", license="GPL-3.0"),
            r"corpus\.sources\.notes\.license: 'GPL-3\.0' is not covered by",
        ),
        (config(tmp_path / "notes", license="my own"), r"corpus\.sources\.notes\.license: 'my own' is not an SPDX"),
        (
            CorpusConfig(sources={"code": SourceConfig(packages=("pyarrow", "no-such-thing"), take="code")}),
            r"corpus\.sources\.code\.packages: 'no-such-thing' is not installed; `pip install no-such-thing`",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call(cfg)


def test_a_column_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", rows_of())
    (tmp_path / "out").mkdir()
    with pytest.raises(
        InputError, match=r"corpus\.sources\.notes\.group_field: .* no column 'domain'; it has text, repo, lic"
    ):
        build_corpus(config(path, group_field="domain"), tmp_path / "out")


def test_the_fingerprint_follows_names_and_contents(tmp_path):
    folder = notes(tmp_path / "notes")
    first = fingerprint(config(folder))
    assert fingerprint(config(tmp_path / "notes" / "*.md")) == first  # the same files by another way
    (folder / "note-1.md").write_text(text_of(1) + ".")
    second = fingerprint(config(folder))
    (folder / "note-1.md").rename(folder / "note-x.md")
    assert len({first["notes"], second["notes"], fingerprint(config(folder))["notes"]}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give exactly one of"),
        ({"path": "a", "dataset": "b"}, "path and dataset: give exactly one"),
        ({"packages": ("numpy",)}, "take"),
        ({"packages": ("numpy",), "take": "code", "license": "MIT"}, "license"),
        ({"path": "a", "take": "code"}, "take=code"),
        ({"path": "a", "license": "MIT", "license_field": "l"}, "license_field"),
        ({"path": "a", "weight": {0.5: 1.0}}, "weight="),
        ({"path": "a", "weight": -1.0}, "weight="),
        ({"path": "a", "weight": {0.0: (1.0, -1.0)}}, "weight="),
    ],
)
def test_impossible_sources_are_refused_when_they_are_written(changes, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**changes)
