"""Artifacts: complete or absent, sealed, and traceable."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.artifact import (
    MANIFEST,
    Artifact,
    Built,
    commit,
    content_hash,
    lineage,
    load,
    prepare,
    remove,
    stage_key,
    standing,
    verify,
)
from gristmill.errors import Failure, InputError


def make(path: Path, text: str = "hello", inputs: dict[str, Artifact] | None = None, **built: object) -> Artifact:
    prepare(path)
    (path / "deep").mkdir()
    (path / "a.txt").write_text(text)
    (path / "deep" / "b.bin").write_bytes(bytes(range(256)))
    return commit(path, kind="corpus", key="k" * 64, config={}, inputs=inputs or {}, built=Built(**built))  # type: ignore[arg-type]


def test_a_directory_without_a_manifest_is_no_artifact_and_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "half").write_text("half")
    with pytest.raises(InputError, match="has no manifest"):
        load(tmp_path / "x")
    assert standing(tmp_path / "x", "k") is None
    assert list(prepare(tmp_path / "x").iterdir()) == []


def test_a_committed_artifact_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(Failure, match="never overwritten"):
        prepare(tmp_path / "x")


def test_an_artifact_that_is_removed_in_part_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x")
    monkeypatch.setattr(shutil, "rmtree", lambda path: (path / "a.txt").unlink())  # killed after the first file
    remove(tmp_path / "x")
    assert (tmp_path / "x" / "deep" / "b.bin").exists()
    with pytest.raises(InputError, match="has no manifest"):
        load(tmp_path / "x")


def test_every_flipped_byte_of_every_file_is_found(tmp_path: Path) -> None:
    make(tmp_path / "x")
    assert verify(tmp_path / "x").problems == []
    for name in ("a.txt", "deep/b.bin"):
        file = tmp_path / "x" / name
        good = file.read_bytes()
        for place in range(0, len(good), 37):
            file.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
            (problem,) = verify(tmp_path / "x").problems
            assert str(file) in problem
        file.write_bytes(good)


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    make(tmp_path / "x")
    file = tmp_path / "x" / MANIFEST
    good = file.read_bytes()
    for place in range(len(good)):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x04]) + good[place + 1 :])
        with pytest.raises(Failure, match="damaged"):
            load(tmp_path / "x")


def test_a_missing_file_and_an_unlisted_one_are_named(tmp_path: Path) -> None:
    make(tmp_path / "x")
    (tmp_path / "x" / "a.txt").unlink()
    (tmp_path / "x" / "guest.txt").write_text("new")
    result = verify(tmp_path / "x")
    assert ["a.txt is missing" in line for line in result.problems] == [True]
    assert [Path(line).name for line in result.not_covered] == ["guest.txt"]


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=5))
def test_the_content_hash_depends_on_paths_and_bytes_and_on_nothing_else(files: dict[str, str]) -> None:
    entries = {name: {"sha256": text, "bytes": 1} for name, text in files.items()}
    again = {name: {"sha256": entries[name]["sha256"], "bytes": 2} for name in reversed(entries)}
    assert content_hash(entries) == content_hash(again)
    assert content_hash(entries) != content_hash(entries | {"\0 other": {"sha256": "x"}})


def test_figures_do_not_change_the_content_but_configuration_and_inputs_change_the_key(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", metrics={"seconds": 1.0}), make(tmp_path / "b", metrics={"seconds": 2.0})
    assert a.content == b.content
    keys = {
        stage_key("corpus", 1, {"x": 1}, {"in": "h"}),
        stage_key("corpus", 1, {"x": 2}, {"in": "h"}),
        stage_key("corpus", 2, {"x": 1}, {"in": "h"}),
        stage_key("corpus", 1, {"x": 1}, {"in": "other"}),
        stage_key("shards", 1, {"x": 1}, {"in": "h"}),
    }
    assert len(keys) == 5


def test_lineage_reaches_every_source_even_when_the_model_has_moved_away_alone(tmp_path: Path) -> None:
    source = {"documents": 2, "bytes": 10, "licenses": {"MIT": 7, "ISC": 3}, "fingerprint": "f"}
    corpus = make(tmp_path / "corpus", sources={"code": source, "prose": source})
    model = make(tmp_path / "model", text="weights", inputs={"corpus": corpus})
    assert model.licenses == {"MIT": 14, "ISC": 6}
    (tmp_path / "model").rename(tmp_path / "moved")
    for name in ("a.txt", "deep/b.bin", MANIFEST):
        (tmp_path / "corpus" / name).unlink()
    (parent,) = lineage(tmp_path / "moved").inputs
    assert parent.content == corpus.content
    assert [(node.name, node.detail["licenses"]) for node in parent.inputs] == [
        ("code", source["licenses"]),
        ("prose", source["licenses"]),
    ]


def test_a_manifest_is_canonical_json(tmp_path: Path) -> None:
    make(tmp_path / "x")
    text = (tmp_path / "x" / MANIFEST).read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2, ensure_ascii=False) + "\n"
