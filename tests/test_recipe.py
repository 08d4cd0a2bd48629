"""Recipes: strict, derived, and with messages that name the key, the value, the rule and the fix."""

import glob
import math
import os
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gristmill.corpus.paths import find_files
from gristmill.errors import InputError
from gristmill.evaluate.config import EvaluateConfig
from gristmill.home import expand
from gristmill.model import ModelConfig
from gristmill.recipe import load_recipe, load_shape, schema, shipped_recipes, to_yaml
from gristmill.serve.database import default_database
from gristmill.stage import keyed
from gristmill.streaming.config import default_cache
from gristmill.streaming.order import MixPhase
from gristmill.train.config import GuardConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from gristmill.train.curriculum import curriculum_of


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
        ("export.name=[a", r"the value is not valid: line 1"),
        ("export.name=2024", r"export\.name=2024: text is needed; put it in quotes"),
        ("export.name=true", r"export\.name=true: text is needed, not true or false; put it in quotes"),
        ("train={steps: 3, steps: 4}", r"the key 'steps' appears twice, in lines 1 and 1"),
        ("train.seed=2:15", r"train\.seed='2:15': input should be a valid integer, not text"),
        ("train.steps=5_000", r"train\.steps='5_000': input should be a valid integer, not text"),
        ('train.steps="500"', r"train\.steps='500': input should be a valid integer, not text"),
        ("train.steps=2.5", r"train\.steps=2\.5: input should be a valid integer"),
        ("train.steps=123456789012345678901234567890", r"an integer must fit in 64 bits"),
        ("train.steps=1e25", r"train\.steps=1e\+25 is too large"),
        ("train.steps=9007199254740993", r"steps=9007199254740993 x batch_tokens=\d+ must be below 2\*\*62"),
        ("tokenizer.vocab_size=9000000", r"tokenizer\.vocab_size=9000000 must be at least 264 .* at most 2097152"),
        ("train.threads=5000000", r"threads=5000000 must be from 1 to 1024"),
        ("train.rank_timeout_s=1e20", r"rank_timeout_s=1e\+20 must be above 0 and at most 10,000,000"),
        ("train.compile=yes", r"train\.compile='yes': input should be a valid boolean: true or false"),
        ("train.compile=1", r"train\.compile=1: true or false is needed"),
        ("model.clip_qkv=1e39", r"model\.clip_qkv=1e\+39 is too large"),
        ("corpus.sources={a: {path: x, weight: {0.0: 1, 0.5: [1, .inf]}}}", r"weight\.0\.5\.1=inf: a finite number"),
        ("corpus.sources={a: {path: x, weight: {0.0: 1, 0: 2}}}", r"the key 0 appears twice"),
        ('corpus.sources={a: {path: x, weight: {0.0: 1, "0": 2}}}', r"weight\.0='0': input should be a valid number"),
        ("corpus.sources={true: {path: x, license: MIT}}", r"corpus\.sources\.True=true: text is needed"),
        ("evaluate.temperature=2e-7", r"evaluate\.temperature=2e-07 must be 0 \(greedy\) or at least 1e-6"),
        ("evaluate.temperature=0", r"evaluate\.temperature=0\.0 must be positive"),
        ("evaluate.top_p=1.5", r"evaluate\.top_p=1\.5 must be above 0 and at most 1"),
        ("evaluate.seed=-3", r"evaluate\.seed=-3 must be from 0"),
        ("train.balance=bias", r"train\.balance=bias does not fit model\.moe_router_bias=false"),
        ("model.moe_router_bias=true", r"train\.balance=global does not fit model\.moe_router_bias=true"),
        ("model={ffn: dense, moe_router_bias: true}", r"moe_router_bias=true has no effect with ffn=dense"),
        ("model.moe_normalize_expert_weights=0", r"moe_normalize_expert_weights=0\.0 must be positive"),
        ("=3", r"must look like train\.steps=100"),
        ("train..steps=3", r"must look like train\.steps=100"),
        ("a.b.c=3", r"^a: unknown key"),
        ("evaluate.every=0", r"evaluate\.every=0 must be `checkpoint` or a number of steps, at least 1"),
        ("evaluate.every=epoch", r"evaluate\.every='epoch' must be `checkpoint` or a number of steps, at least 1"),
        ('evaluate.every="20"', r"evaluate\.every='20' must be `checkpoint` or a number of steps, at least 1"),
        ("train.schedule={name: cosine, decay: 0.2}", r"decay=0\.2 belongs to wsd and cosine does not use it"),
        ("train.schedule={name: cosine, warmup: 1.5}", r"train\.schedule\.warmup=1\.5 must be from 0 to 1"),
        ("evaluate.sample_tokens=5000", r"sample_tokens=5000 must be together below model\.max_seq_len"),
        ("corpus.sources={a: {path: x, weight: 0}}", r"corpus\.sources: their weights make no curriculum"),
        ("train.tracking.uri=http://me:secret@host", r"uri must hold no password"),
    ],
)
def test_bad_settings_are_refused_with_the_path_and_the_rule(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("quickstart", [override])


def number_fields(cls: Any, path: str = "") -> Iterator[tuple[str, set[Any]]]:
    """The settings of a configuration class that are numbers, with the types that they take."""
    for name, hint in typing.get_type_hints(cls).items():
        kinds = set(typing.get_args(hint)) or {hint}
        if is_dataclass(hint):
            yield from number_fields(hint, f"{path}{name}.")
        elif not kinds.isdisjoint({int, float}):
            yield f"{path}{name}", kinds


@pytest.mark.parametrize("text", ["nan", ".nan", "NaN", "inf", "-inf", ".inf", "-.INF", "Infinity", "1e999", '"1e999"'])
def test_no_number_of_a_recipe_takes_a_value_that_is_not_finite(text: str) -> None:
    settings = dict(number_fields(schema()))
    assert {"train.guard.sigmas", "train.rank_timeout_s", "evaluate.temperature", "train.schedule.warmup"} <= {
        *settings
    }
    for setting in settings:
        or_text = "| must be `checkpoint` or" if setting == "evaluate.every" else ""  # it takes a number or a word
        with pytest.raises(InputError, match=rf"^{setting}=.*(: a finite number is needed{or_text})"):
            load_recipe("quickstart", [f"{setting}={text}"])


def test_no_number_of_a_recipe_takes_a_boolean_or_a_huge_integer() -> None:
    for setting, kinds in number_fields(schema()):
        for text in ("true", str(2**63), f"-{2**64}", *(["1e19"] if float not in kinds else [])):
            with pytest.raises(InputError) as refused:
                load_recipe("quickstart", [f"{setting}={text}"])
            assert "\n" not in str(refused.value)


def test_configurations_made_in_python_refuse_nan_too() -> None:
    for make in (
        lambda: OptimizerConfig(lr=math.nan),
        lambda: OptimizerConfig(weight_decay=math.nan),
        lambda: ScheduleConfig(warmup=math.nan),
        lambda: GuardConfig(sigmas=math.nan),
        lambda: TrainConfig(steps=1, rank_timeout_s=math.nan),
        lambda: EvaluateConfig(temperature=math.nan),
        lambda: ModelConfig(moe_normalize_expert_weights=math.nan),
    ):
        with pytest.raises(ValueError, match="=nan"):
            make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: quickstart\nname: a\ntrain: {steps: 3}\nmodel: {n_layers: 1}\ntrain:\n  seed: 1\n",
         r"the key 'train' appears twice, in lines 3 and 5"),
        ("base: quickstart\nname: a\ntrain:\n  steps: 3\n  optimizer:\n    lr: 1\n    lr: 2\n",
         r"the key 'lr' appears twice, in lines 6 and 7"),
        ("name: a\nx: &x {steps: 1}\ntrain: {<<: *x}\n", r"line 3: merge keys \(<<\) are not supported"),
        ("name: a\n---\nname: b\n", r"expected a single document"),
        ("name: !!python/name:os.system a\n", r"line 1: the tag \S*python/name:os.system does not fit"),
        ("a: &a [*a]\n", r"nested too deeply"),
        ("[" * 3000, r"nested too deeply"),
        ("a: " + "{a: " * 3000, r"nested too deeply"),
        ("", r"is empty; it must be a mapping"),
        ("- a\n- b\n", r"is a list; it must be a mapping"),
        ("name:\ta\n\tb: 1\n", r"line \d, column \d"),
        ("? [a, b]\n: 1\n", r"line 1: a key must be text or a number"),
        ("name: a\x00\n", r"is not valid"),
        ('name: "\\udead"\n', r"surrogate"),
        ("base: [quickstart]\n", r"base=\['quickstart'\] must be the name"),
        ("base: quickstart\nname: a\n1: 2\n", r"^1: unknown key"),
        ('base: quickstart\nname: a\n"x\\ny": 2\n', r"^'x\\ny': unknown key"),
        ("base: quickstart\nname: a\ntrain:\n", r"^train=None"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_recipe_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        load_recipe(str(tmp_path / "a.yaml"))
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9\n".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    for name, message in (("latin", "is not UTF-8"), ("folder", "Is a directory"), ("none", "No such file")):
        with pytest.raises(InputError, match=message):
            load_recipe(str(tmp_path / f"{name}.yaml"))
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe("nul\0.yaml")


def test_numbers_and_words_are_read_as_yaml_1_2_says(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "\ufeffbase: quickstart\nname: no\ntrain: {steps: 0100, seed: 0o17, log_every: 0x10, optimizer: {lr: 1e-3}}\n"
        "corpus: {sources: {off: {path: x, license: MIT}}}\nexport: {name: 2020-01-01}\n"
    )
    recipe = load_recipe(str(file), ["train.checkpoint.every=1e3"])
    assert (recipe.name, list(recipe["corpus"].sources), recipe["export"].name) == ("no", ["off"], "2020-01-01")
    assert (recipe["train"].steps, recipe["train"].seed, recipe["train"].log_every) == (100, 15, 16)
    assert (recipe["train"].optimizer.lr, recipe["train"].checkpoint.every) == (1e-3, 1000)


def test_relative_paths_start_from_the_recipe_file_and_in_set_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("p[1]/notes", "child", "elsewhere/mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "p[1]/notes/a.txt").write_text("a")
    (tmp_path / "p[1]/parent.yaml").write_text(
        "base: quickstart\nname: parent\nshards: {cache: here}\ncorpus: {sources: {a: {path: notes, license: MIT}, "
        'b: {path: "notes/*.txt", license: MIT}, c: {path: ~/c, license: MIT}, d: {path: /d, license: MIT}, '
        "e: {dataset: org/name, license: MIT}, f: {dataset: notes, license: MIT}}}\n"
    )
    (tmp_path / "child/child.yaml").write_text("base: ../p[1]/parent.yaml\nname: child\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe("../child/child.yaml", ["corpus.sources.c.path=mine"])
    sources = recipe["corpus"].sources
    assert os.path.samefile(str(sources["a"].path), tmp_path / "p[1]/notes")
    assert [Path(file).name for file in glob.glob(str(sources["b"].path))] == ["a.txt"]
    assert (sources["c"].path, sources["d"].path, sources["e"].dataset) == ("mine", "/d", "org/name")
    assert os.path.samefile(str(sources["f"].dataset), tmp_path / "p[1]/notes")
    assert Path(str(recipe["shards"].cache)).resolve() == tmp_path / "p[1]/here"


def test_the_place_of_a_source_is_not_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("base: quickstart\nname: a\ncorpus: {sources: {a: {path: b, license: MIT}}}\n")
    far = keyed(load_recipe(str(tmp_path / "a.yaml"))["corpus"])
    monkeypatch.chdir(tmp_path)
    assert keyed(load_recipe("a.yaml")["corpus"]) == far


def test_a_home_that_is_unknown_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.setattr(Path, "home", lambda: unknown(Path()))
    for name in ("GRISTMILL_DATABASE", "GRISTMILL_CACHE", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for call in (default_database, default_cache, lambda: expand("~/notes"), lambda: find_files("~/notes", "here")):
        with pytest.raises(InputError, match=r"home directory.* is unknown; set HOME"):
            call()
    monkeypatch.setenv("GRISTMILL_DATABASE", "keys.sqlite")
    assert default_database() == "keys.sqlite"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")


def test_a_child_merges_sections_and_replaces_values(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: quickstart\nname: child\ntrain: {steps: 7, optimizer: {lr: 1e-3}}\n")
    parent, merged = load_recipe("quickstart"), load_recipe(str(child))
    assert (merged.name, merged["train"].steps, merged["train"].optimizer.lr) == ("child", 7, 1e-3)
    assert merged["train"].seq_len == parent["train"].seq_len
    assert merged["corpus"] == parent["corpus"]
    child.write_text("base: quickstart\nname: child\ncorpus: {sources: {notes: {path: ., license: MIT}}}\n")
    assert list(load_recipe(str(child))["corpus"].sources) == ["notes"]


def test_a_recipe_that_is_its_own_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\nname: a\n")
    for parent in (tmp_path / "a.yaml", f"../{tmp_path.name}/a.yaml"):
        (tmp_path / "b.yaml").write_text(f"base: {parent}\nname: b\n")
        with pytest.raises(InputError, match="leads back to itself"):
            load_recipe(str(tmp_path / "a.yaml"))


def test_vocabulary_and_context_are_derived() -> None:
    recipe = load_recipe("quickstart", ["tokenizer.vocab_size=1000"])
    assert recipe["model"].vocab_size == 1024
    assert recipe["evaluate"].context_length == recipe["train"].seq_len


def test_a_pair_of_weights_is_a_ramp_up_to_the_next_change() -> None:
    sources = "{a: {path: x, weight: {0.0: 3, 0.5: [3, 1]}}, b: {path: y, weight: {0.0: 1, 0.75: 2}}}"
    assert curriculum_of(load_recipe("quickstart", [f"corpus.sources={sources}"])["corpus"]) == (
        MixPhase(until=0.5, mix={"a": 3.0, "b": 1.0}),
        MixPhase(until=0.75, mix={"a": 3.0, "b": 1.0}, to={"a": 2.0, "b": 1.0}),
        MixPhase(until=1.0, mix={"a": 2.0, "b": 2.0}, to={"a": 1.0, "b": 2.0}),
    )


def test_weights_become_a_curriculum_with_a_stage_at_every_change() -> None:
    sources = "{a: {path: x, weight: {0.0: 3, 0.5: 1}}, b: {path: y, weight: {0.0: 1, 0.75: 0}}, c: {path: z}}"
    stages = curriculum_of(load_recipe("quickstart", [f"corpus.sources={sources}"])["corpus"])
    assert [(stage.until, stage.mix) for stage in stages] == [
        (0.5, {"a": 3, "b": 1, "c": 1}),
        (0.75, {"a": 1, "b": 1, "c": 1}),
        (1.0, {"a": 1, "b": 0, "c": 1}),
    ]


def test_operational_settings_stay_out_of_the_key() -> None:
    before = load_recipe("quickstart")
    after = load_recipe("quickstart", ["train.checkpoint.every=7", "train.tracking.enabled=false", "train.log_every=3"])
    assert keyed(before["train"]) == keyed(after["train"])
    assert keyed(before["corpus"]) == keyed(load_recipe("quickstart", ["corpus.sources.code.weight=9"])["corpus"])
    assert keyed(before["train"]) != keyed(load_recipe("quickstart", ["train.optimizer.lr=1"])["train"])


def test_the_quickstart_is_short_and_says_what_it_does() -> None:
    text = Path(load_recipe.__code__.co_filename).with_name("recipes").joinpath("quickstart.yaml").read_text()
    assert len(text.splitlines()) < 80
    assert yaml.safe_load(text)["name"] == "quickstart"
