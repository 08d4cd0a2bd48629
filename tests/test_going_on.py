"""Training that begins with a published model: out, in, on, out again."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gristmill import artifact
from gristmill.errors import Failure, InputError
from gristmill.hub.export import export_model
from gristmill.hub.folder import open_model
from gristmill.hub.importing import import_model
from gristmill.hub.quantized import QuantizeConfig
from gristmill.inference import find_model
from gristmill.inference.quantizing import quantize_model
from gristmill.pipeline import run
from gristmill.recipe import load_recipe, to_yaml
from gristmill.stage import Recipe

GO_ON = ("tokenizer=null", "model=null", "train.optimizer.name=adamw", "export.checked_greedy=0")


@pytest.fixture(scope="module")
def published(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 directory under a license, as its makers would publish it."""
    out = export_model(find_model(tiny_run), tmp_path_factory.mktemp("hub") / "some-model", torch.bfloat16).path
    (out / "LICENSE").write_text("terms")
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Some model\n")
    (out / "manifest.json").unlink()
    return out


@pytest.fixture(scope="module")
def imported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_model(published, tmp_path_factory.mktemp("models") / "some-model").path


def test_a_step_of_size_zero_gives_the_published_weights_back(
    imported: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = run(
        tiny_recipe(*GO_ON, f"start={imported}", "train.optimizer.lr=1e-30", "train.steps=2"), tmp_path / "run"
    )
    before, after = open_model(imported), open_model(find_model(folder))
    assert after.cfg == before.cfg
    for name, weight in before.weights.items():
        assert torch.equal(after.weights[name].load(), weight.load().float()), name


def test_a_model_goes_on_and_leaves_with_its_origin(
    imported: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*GO_ON, f"start={imported}", "train.steps=4", "model={moe_loss_weight: 0.0}")
    folder = run(recipe, tmp_path / "run")
    report = json.loads((folder / "report.json").read_text())
    assert report["export_max_logit_diff"] < 1e-4
    made = artifact.load(folder).metrics["stages"]
    card = (folder / made["export"] / "README.md").read_text()
    assert "some-model" in card
    assert "apache-2.0" in card
    assert (folder / made["export"] / "LICENSE").read_text() == "terms"
    names = {origin.name for origin in walk(artifact.lineage(folder / made["train"]))}
    assert {"some-model", "notes", "verse"} <= names
    AutoModelForCausalLM.from_pretrained(folder / made["export"], local_files_only=True)
    # the printed recipe means the same
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    # another model to go on from is another training
    other = export_model(imported, tmp_path / "other", torch.float16).path
    changed = dataclasses.replace(recipe, start=str(import_model(other, tmp_path / "in").path))
    run(changed, folder)
    assert artifact.load(folder).metrics["stages"]["train"] != made["train"]


def test_damaged_weights_are_not_trained_on(imported: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(imported, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(Failure, match=r"model.safetensors is damaged.*import it again"):
        run(tiny_recipe(*GO_ON, f"start={copy}"), tmp_path / "run")


def walk(origin: artifact.Origin) -> list[artifact.Origin]:
    return [origin, *(node for parent in origin.inputs for node in walk(parent))]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start": "nowhere"}, r"start=\S*/nowhere: \S*/nowhere holds no model; give a run folder"),
        ({"tokenizer": {"kind": "gpt4"}}, r"tokenizer: start=.* brings its own; leave this section out"),
        ({"model": {"n_layers": 3}}, r"model.n_layers=3: start=.* has 2; only max_seq_len, .* can change"),
        ({"start": None, "tokenizer": {"kind": "start"}}, r"tokenizer.kind=start: there is no model"),
    ],
)
def test_what_cannot_go_on_is_said(
    imported: Path, published: Path, tiny_yaml: Path, tmp_path: Path, changes: dict, says: str
) -> None:
    tree = yaml.safe_load(tiny_yaml.read_text()) | {"start": str(imported), "tokenizer": None, "model": None} | changes
    tree = {k: v.format(published=published) if isinstance(v, str) else v for k, v in tree.items() if v is not None}
    (tmp_path / "go.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=says):
        load_recipe(str(tmp_path / "go.yaml"))


def test_a_run_an_export_and_a_quantized_directory_are_trained_further(
    tiny_run: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    """A chain of three runs: from a run folder, then from that run's own export, quantized."""
    few = ("train.steps=2", "train.checkpoint.every=2", "export.checked_greedy=0")
    (tmp_path / "second.yaml").write_text(f"base: {tiny_yaml}\nname: second\nstart: {tiny_run}\n")
    second = run(load_recipe(str(tmp_path / "second.yaml"), few), tmp_path / "second")
    begun = artifact.load(find_model(second)).manifest["inputs"]["start"]
    assert begun["content"] == artifact.load(find_model(tiny_run)).content
    assert "trained further on" in (second / "report.html").read_text()
    export = second / artifact.load(second).metrics["stages"]["export"]
    quantized = quantize_model(export, tmp_path / "quantized", QuantizeConfig(bits=8, group=32)).path
    recipe = load_recipe(str(tiny_yaml), (*few, f"start={quantized}"))
    third = run(recipe, tmp_path / "third")
    (imported,) = (third / "start").iterdir()
    for name, weight in open_model(quantized).weights.items():
        assert torch.equal(open_model(imported).weights[name].load(), weight.load()), name
    origins = walk(artifact.lineage(third / "train" / find_model(third).parent.name / "step-00000002"))
    trained = {origin.content for origin in origins if origin.kind == "checkpoint"}
    assert trained == {artifact.load(find_model(folder)).content for folder in (tiny_run, second, third)}
    assert artifact.verify(third).problems == []
    before = (third / "report.json").read_bytes()
    run(recipe, third)  # nothing is imported or trained again
    assert (third / "report.json").read_bytes() == before
    with pytest.raises(InputError, match="is the run folder itself; name a checkpoint in it"):
        run(load_recipe(str(tiny_yaml), (*few, f"start={third}")), third)


def test_sections_of_a_base_give_way_to_the_start_and_those_next_to_it_do_not(
    imported: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    file = tmp_path / "go.yaml"
    base = f"base: {tiny_yaml}\nstart: {imported}\n"
    file.write_text(base + "model: {moe_loss_weight: 0.0}\n")
    recipe = load_recipe(str(file))
    assert (recipe["tokenizer"].kind, recipe["model"].moe_loss_weight, recipe["model"].d_model) == ("start", 0.0, 32)
    assert load_recipe(str(file), ["model.max_seq_len=64"])["model"].max_seq_len == 64
    file.write_text(base + "model: {d_model: 64}\n")
    with pytest.raises(InputError, match=r"model.d_model=64: start=.* has 32"):
        load_recipe(str(file))
    file.write_text(base)
    with pytest.raises(InputError, match="start=null: the recipe takes its model from start="):
        load_recipe(str(file), ["start=null"])
