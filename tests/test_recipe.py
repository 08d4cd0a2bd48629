"""Recipes: strict, derived, and with messages that name the key, the value, the rule and the fix."""

from pathlib import Path

import pytest
import yaml

from gristmill.errors import InputError
from gristmill.recipe import curriculum_of, keyed, load_recipe, load_shape, shipped_recipes, to_yaml
from gristmill.streaming.order import Stage


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if load_shape(name).train])
def test_a_printed_recipe_means_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe_topk=2", r"model\.moe_topk: unknown key; did you mean 'moe_top_k'\?"),
        ("trian.steps=2", r"trian: unknown key; did you mean 'train'\?"),
        ("corpus.sources.code.licence=MIT", r"corpus\.sources\.code\.licence: unknown key; did you mean 'license'\?"),
        ("model.moe_top_k=17", r"model\.moe_top_k=17 must be from 1 to moe_num_experts=16"),
        ("model.d_model=385", r"model\.d_model=385 must be a multiple of n_heads=4"),
        ("train.steps=many", r"train\.steps='many': input should be a valid integer"),
        ("train.optimizer.name=sgd", r"train\.optimizer\.name='sgd': input should be 'adamw' or 'muon'"),
        ("train.seq_len=500", r"train\.batch_tokens=\d+ must be a multiple of seq_len=500"),
        ("model.vocab_size=100", r"model\.vocab_size=100 must be at least tokenizer\.vocab_size="),
        ("model.max_seq_len=64", r"train\.seq_len=512 must not exceed model\.max_seq_len=64"),
        ("shards.block_tokens=1000", r"train\.seq_len=512 must divide shards\.block_tokens=1000"),
        ("train.steps", r"must look like train\.steps=100"),
        ("train.steps.x=1", r"'x' lies below a plain value"),
        ("corpus.sources={a: {path: x, weight: -1}}", r"corpus\.sources\.a\.weight=-1"),
        ("train=[1]", r"train="),
        ("train.steps=true", r"train\.steps=true: a number or text is needed"),
        ("train.optimizer.lr=.nan", r"train\.optimizer\.lr=nan: a finite number is needed"),
        ("train.optimizer.weight_decay=-1", r"weight_decay=-1\.0 must not be negative"),
        ("name=..", r"name='\.\.' names a folder"),
        ("export.name=2024-99-99", r"the value is not YAML"),
        ("evaluate.sample_tokens=5000", r"sample_tokens=5000 must be together below model\.max_seq_len"),
        ("corpus.sources={a: {path: x, weight: 0}}", r"corpus\.sources: their weights make no curriculum"),
        ("train.tracking.uri=http://me:secret@host", r"uri must hold no password"),
    ],
)
def test_bad_settings_are_refused_with_the_path_and_the_rule(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("quickstart", [override])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")


def test_a_child_merges_sections_and_replaces_values(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: quickstart\nname: child\ntrain: {steps: 7, optimizer: {lr: 1e-3}}\n")
    parent, merged = load_recipe("quickstart"), load_recipe(str(child))
    assert (merged.name, merged.train.steps, merged.train.optimizer.lr) == ("child", 7, 1e-3)
    assert merged.train.seq_len == parent.train.seq_len
    assert merged.corpus == parent.corpus
    child.write_text("base: quickstart\nname: child\ncorpus: {sources: {notes: {path: ., license: MIT}}}\n")
    assert list(load_recipe(str(child)).corpus.sources) == ["notes"]


def test_a_recipe_that_is_its_own_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\nname: a\n")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path / 'a.yaml'}\nname: b\n")
    with pytest.raises(InputError, match="leads back to itself"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_vocabulary_and_context_are_derived() -> None:
    recipe = load_recipe("quickstart", ["tokenizer.vocab_size=1000"])
    assert recipe.model.vocab_size == 1024
    assert recipe.evaluate.context_length == recipe.train.seq_len


def test_a_pair_of_weights_is_a_ramp_up_to_the_next_change() -> None:
    sources = "{a: {path: x, weight: {0.0: 3, 0.5: [3, 1]}}, b: {path: y, weight: {0.0: 1, 0.75: 2}}}"
    assert curriculum_of(load_recipe("quickstart", [f"corpus.sources={sources}"]).corpus) == (
        Stage(until=0.5, mix={"a": 3.0, "b": 1.0}),
        Stage(until=0.75, mix={"a": 3.0, "b": 1.0}, to={"a": 2.0, "b": 1.0}),
        Stage(until=1.0, mix={"a": 2.0, "b": 2.0}, to={"a": 1.0, "b": 2.0}),
    )


def test_weights_become_a_curriculum_with_a_stage_at_every_change() -> None:
    sources = "{a: {path: x, weight: {0.0: 3, 0.5: 1}}, b: {path: y, weight: {0.0: 1, 0.75: 0}}, c: {path: z}}"
    stages = curriculum_of(load_recipe("quickstart", [f"corpus.sources={sources}"]).corpus)
    assert [(stage.until, stage.mix) for stage in stages] == [
        (0.5, {"a": 3, "b": 1, "c": 1}),
        (0.75, {"a": 1, "b": 1, "c": 1}),
        (1.0, {"a": 1, "b": 0, "c": 1}),
    ]


def test_operational_settings_stay_out_of_the_key() -> None:
    before = load_recipe("quickstart")
    after = load_recipe("quickstart", ["train.checkpoint.every=7", "train.tracking.enabled=false", "train.log_every=3"])
    assert keyed(before.train) == keyed(after.train)
    assert keyed(before.corpus) == keyed(load_recipe("quickstart", ["corpus.sources.code.weight=9"]).corpus)
    assert keyed(before.train) != keyed(load_recipe("quickstart", ["train.optimizer.lr=1"]).train)


def test_the_quickstart_is_short_and_says_what_it_does() -> None:
    text = Path(load_recipe.__code__.co_filename).with_name("recipes").joinpath("quickstart.yaml").read_text()
    assert len(text.splitlines()) < 80
    assert yaml.safe_load(text)["name"] == "quickstart"
