"""Names decide which model a folder stands for; file times, copies and clocks do not."""

import os
import shutil
from pathlib import Path

import pytest

from gristmill import artifact
from gristmill.artifact import Artifact, Built
from gristmill.current import find_ancestor, find_checkpoint, find_stages, record_stage
from gristmill.errors import Failure, InputError
from gristmill.pipeline import names_of

ORDER = names_of()


def make(path: Path, kind: str, text: str = "", **inputs: Artifact) -> Artifact:
    artifact.prepare(path)
    (path / "data").write_text(text or path.name)
    return artifact.commit(path, kind=kind, key=path.name * 8, config={}, inputs=inputs, built=Built())


def training(folder: Path, *steps: int, latest: str | None) -> Path:
    for step in steps:
        make(folder / f"step-{step:08d}", "checkpoint")
    if latest is not None:
        (folder / "latest").write_text(f"{latest}\n")
    return folder


def age(folder: Path, oldest: str) -> None:
    """Every file is from 2001, except those below a folder named `oldest`, which are from 1999."""
    for file in folder.rglob("*"):
        seconds = 915_148_800 if oldest in file.parts else 978_307_200
        os.utime(file, (seconds, seconds))


def test_latest_names_the_checkpoint_whatever_the_file_times_say(tmp_path: Path) -> None:
    folder = training(tmp_path / "run/train/aa", 2, 4, latest="step-00000004")
    age(tmp_path, oldest="step-00000004")
    for path in (tmp_path / "run", folder):
        found = find_checkpoint(path)
        assert found is not None
        assert found.name == "step-00000004"


def test_without_latest_the_highest_step_counts_whatever_the_file_times_say(tmp_path: Path) -> None:
    training(tmp_path / "run/train/aa", 2, 10, latest=None)
    (tmp_path / "run/train/aa/step-00000012").mkdir()  # interrupted: no manifest
    make(tmp_path / "run/train/aa/step-00000099-mine", "checkpoint")
    age(tmp_path, oldest="step-00000010")
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/train/aa/step-00000010"


@pytest.mark.parametrize("named", ["step-00000006", "../elsewhere", "", "\x00", "step-00000003"])
def test_a_latest_that_names_no_checkpoint_is_an_error_that_lists_them(tmp_path: Path, named: str) -> None:
    folder = training(tmp_path / "train/aa", 2, 4, latest=named)
    (folder / "step-00000003").mkdir()
    with pytest.raises(Failure, match=r"latest names .*name one of: .*step-00000002, .*step-00000004"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("latest", ["step-00000004", None])
def test_a_damaged_manifest_is_named_and_no_other_checkpoint_takes_its_place(
    tmp_path: Path, latest: str | None
) -> None:
    folder = training(tmp_path / "train/aa", 2, 4, latest=latest)
    (folder / "step-00000004/manifest.json").write_text("{}")
    with pytest.raises(Failure, match=r"step-00000004/manifest.json is damaged.*; name one of: .*step-00000002$"):
        find_checkpoint(tmp_path)


def test_two_trainings_of_which_nothing_names_one_are_an_error_that_lists_them(tmp_path: Path) -> None:
    for name in ("aa", "bb"):
        training(tmp_path / "train" / name, 2, latest="step-00000002")
    with pytest.raises(InputError, match=r"has 2 trainings and nothing says which.*train/aa, .*train/bb"):
        find_checkpoint(tmp_path)
    (tmp_path / ".state").mkdir()
    record_stage(tmp_path, "train", tmp_path / "train/aa", ORDER)
    assert find_checkpoint(tmp_path) == tmp_path / "train/aa/step-00000002"
    record_stage(tmp_path, "train", tmp_path / "train/cc", ORDER)
    with pytest.raises(InputError, match=r"train/cc, has no checkpoint yet; name one of: .*train/aa, .*train/bb"):
        find_checkpoint(tmp_path)


def test_a_finished_run_names_its_checkpoint_wherever_the_folder_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    mine = make(run / "train/aa/step-00000002", "checkpoint")
    training(run / "train/bb", 900, latest="step-00000900")
    artifact.commit(run, kind="run", key="r", config={}, inputs={"train": mine}, built=Built(), files=[])
    shutil.copytree(run, tmp_path / "elsewhere/copy", copy_function=shutil.copyfile)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/copy")
    shutil.rmtree(run)
    for path in (tmp_path / "elsewhere/copy", tmp_path / "link"):
        assert find_checkpoint(path) == path / "train/aa/step-00000002"
    shutil.rmtree(tmp_path / "link/train/aa")
    with pytest.raises(Failure, match="train/aa/step-00000002, which is missing"):
        find_checkpoint(tmp_path / "link")


def test_a_folder_without_a_checkpoint_has_no_model(tmp_path: Path) -> None:
    make(tmp_path / "corpus/aa", "corpus")
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "corpus/aa") is None
    assert find_checkpoint(tmp_path / "nowhere") is None


def test_a_changed_stage_drops_those_after_it(tmp_path: Path) -> None:
    (tmp_path / ".state").mkdir()
    for name in ("corpus", "tokenizer"):
        for key in ("aa", "bb"):
            make(tmp_path / name / key, name)
        record_stage(tmp_path, name, tmp_path / name / "aa", ORDER)
    assert find_stages(tmp_path, ORDER) == {name: tmp_path / name / "aa" for name in ("corpus", "tokenizer")}
    record_stage(tmp_path, "corpus", tmp_path / "corpus/aa", ORDER)  # the same: nothing changes
    assert len(find_stages(tmp_path, ORDER)) == 2
    record_stage(tmp_path, "corpus", tmp_path / "corpus/bb", ORDER)
    assert find_stages(tmp_path, ORDER) == {"corpus": tmp_path / "corpus/bb"}
    (tmp_path / ".state/stages.json").unlink()
    with pytest.raises(
        InputError, match=r"nothing says which corpus is current; name one of: .*corpus/aa, .*corpus/bb"
    ):
        find_stages(tmp_path, ORDER)
    (tmp_path / ".state/stages.json").write_text("[]")
    with pytest.raises(Failure, match=r"stages.json is damaged"):
        find_stages(tmp_path, ORDER)


def test_the_corpus_of_a_model_is_the_nearest_in_its_lineage_or_none(tmp_path: Path) -> None:
    first = make(tmp_path / "a/train/aa/step-00000001", "checkpoint", shards=make(
        tmp_path / "a/shards/aa", "shards", corpus=make(tmp_path / "a/corpus/aa", "corpus", "first")))  # fmt: skip
    corpus = make(tmp_path / "b/corpus/bb", "corpus", "second")
    shards = make(tmp_path / "b/shards/bb", "shards", corpus=corpus)
    second = make(tmp_path / "b/train/bb/step-00000001", "checkpoint", shards=shards, start=first)
    exported = make(tmp_path / "out/model", "export", model=second)
    make(tmp_path / "b/corpus/cc", "corpus", "newest")
    for model in (second, exported):
        found = find_ancestor(model, "corpus")
        assert found is not None
        assert found.path == corpus.path
    shutil.rmtree(corpus.path)  # the corpus of the model that it started from does not take its place
    assert find_ancestor(exported, "corpus") is None
    make(corpus.path, "corpus", "another under the same name")
    assert find_ancestor(exported, "corpus") is None
