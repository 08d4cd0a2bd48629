"""A stage is one definition and one entry in a list; the keys of the stages stay as they are."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gristmill import artifact
from gristmill.artifact import Artifact, Built
from gristmill.errors import InputError
from gristmill.evaluate import read_documents
from gristmill.parallel.ranks import ALONE
from gristmill.pipeline import STAGES, names_of, run
from gristmill.recipe import load_recipe
from gristmill.session import Signals
from gristmill.stage import START, Checked, Context, Recipe, Stage, StageRun

MakeRecipe = Callable[..., Recipe]


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    max_bytes: int | None = None


def build_count(run: StageRun[CountConfig], out: Path) -> Built:
    documents = read_documents(run.inputs["corpus"].path, "test", run.config.max_bytes)
    counts = {document.source: len(document.text) for document in documents}
    (out / "count.json").write_bytes(artifact.canonical(counts))
    return Built(metrics={"characters": sum(counts.values())})


COUNT = Stage(
    name="count",
    format=1,
    config=CountConfig,
    inputs=("corpus", "export"),
    build=build_count,
    doing="counting characters",
    summary=lambda metrics: f"{metrics['characters']:,} characters",
)


def test_a_stage_is_added_by_one_definition_and_one_entry_in_the_list(
    tiny_run: Path, tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages, folder = (*STAGES, COUNT), tmp_path / "run"
    shutil.copytree(tiny_run, folder, symlinks=True)
    with pytest.raises(InputError, match=r"count\.max_byte: unknown key; did you mean 'max_bytes'"):
        load_recipe(str(tiny_yaml), ["count.max_byte=9"], stages)

    run(load_recipe(str(tiny_yaml), (), stages), folder, stages=stages)
    said = capsys.readouterr().err
    assert said.count("stands") == 6
    assert "counting characters" in said
    report = json.loads((folder / "report.json").read_text())
    assert report["finished"]
    made = artifact.load(folder / report["stages"]["count"]["path"])
    assert (made.kind, made.manifest["config"]) == ("count", {"max_bytes": None})
    assert set(made.manifest["inputs"]) == {"corpus", "export"}
    assert f"{made.metrics['characters']:,} characters" in said
    assert report["recipe"]["count"] == {"max_bytes": None}

    run(load_recipe(str(tiny_yaml), (), stages), folder, stages=stages)
    assert capsys.readouterr().err.count("stands") == 7
    run(load_recipe(str(tiny_yaml), ["count.max_bytes=100"], stages), folder, stages=stages)
    assert capsys.readouterr().err.count("stands") == 6
    assert artifact.verify(folder).problems == []


def test_a_folder_of_a_version_with_another_format_is_built_again_and_says_so_in_one_line(
    tiny_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, tokenizer, *_ = STAGES
    run(tiny_recipe(), tmp_path, until="tokenizer")
    stages = (corpus, replace(tokenizer, format=tokenizer.format + 1), *STAGES[2:])
    capsys.readouterr()
    run(tiny_recipe(), tmp_path, until="tokenizer", stages=stages)
    assert capsys.readouterr().err.count("another format") == 1
    run(tiny_recipe(), tmp_path, until="tokenizer", stages=stages)
    run(tiny_recipe("tokenizer.vocab_size=400"), tmp_path, until="tokenizer", stages=stages)
    assert "another format" not in capsys.readouterr().err


def test_the_keys_of_the_stages_stay_so_that_finished_runs_stay_finished(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The keys were computed before a stage was an object. A change of `format` changes the key of its stage."""

    def key(stage: Stage, recipe: Recipe, checked: Checked, with_start: bool) -> str:
        names = [*names_of(), *([START] if with_start else [])]
        inputs = {name: Artifact(tmp_path, {"content": name}) for name in names}
        context = Context(
            recipe=recipe, folder=tmp_path, order=names_of(), ranks=ALONE, signals=Signals(), artifacts=inputs
        )
        run = stage.identify(context, checked)
        assert run.folder == tmp_path / stage.name / run.key[:8]
        return run.key

    recipe = tiny_recipe()
    sources = Checked(fingerprint={"notes": "n", "verse": "v"})
    found = {
        stage.name: key(stage, recipe, sources if stage.name == "corpus" else Checked(), False) for stage in STAGES
    }
    assert found == {
        "corpus": "5c0e1b385ec93cbb078c45f724412aec6880e35e0dc878e9e8e788c8923308ad",
        "tokenizer": "f76593570a4100beb8cba2320eea76e4856fb050843848434ff1cd66090646f8",
        "shards": "e2947a7799f602a4f4e5f2b292e053815646cf03123a0d43719dea0ce1560860",
        "train": "629141a8c75ce3f30f74bbb7b6e3e2c173c9f21830301f17a6536e0ee7053484",
        "evaluate": "cad2c19bc6f8dc5ce239c920f3da8ff85ae7d49b8b21e708246e00bf60b6ed7e",
        "export": "8a1dc05175cfc5b9402a940266fd539e6a288ecc41d8878ce601b923eddb97da",
    }
    started = {stage.name: key(stage, recipe, Checked(), True) for stage in STAGES if START in stage.inputs}
    assert started == {
        "tokenizer": "69a5da138d18bcc4059b8cfe9907065ebe13a903dc9cdac32decd3af33e6b0ed",
        "train": "b4d0e026da68115d79489642571bb32992bc8a9c511c78810a1b8946272262a1",
    }
    (shards,) = (stage for stage in STAGES if stage.name == "shards")
    remote = Checked(fingerprint={"remote": "remote"})
    expected = "eb83446277bf2156cfb573bc3cb4bd8b4b2af8fd0aa4882bbdf87b5bf1708acb"
    assert key(shards, tiny_recipe("shards.remote=file:///x"), remote, False) == expected
