"""What a model publishes for generation, what the user asks for, and which of them counts."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import Failure, InputError
from gristmill.inference.sampler import Sampling
from gristmill.inference.settings import NOT_APPLIED, Published, published_sampling

DBRX = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.01}


def publish(folder: Path, said: Any, name: str = "generation_config.json") -> Path:
    text = said if isinstance(said, str) else json.dumps(said)
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", ["generation_config.json", "generation.json"])
def test_the_published_settings_are_used(name: str, tmp_path: Path) -> None:
    published = published_sampling(publish(tmp_path, DBRX | {"eos_token_id": [100257, 100279]}, name))
    assert published.sampling({"seed": 4}) == Sampling(
        temperature=0.7, top_p=0.95, top_k=50, repetition_penalty=1.01, seed=4
    )
    assert published.stop_ids == {100257, 100279}
    assert published.not_applied == ()


def test_without_a_file_ours_are_used(tmp_path: Path) -> None:
    assert published_sampling(tmp_path) == Published()
    assert Published().sampling({}) == Sampling(temperature=0.8, top_p=0.95)


def test_a_setting_of_the_user_wins_alone_and_a_missing_one_is_ours(tmp_path: Path) -> None:
    published = published_sampling(publish(tmp_path, {"do_sample": True, "top_k": 20, "temperature": None}))
    assert published.sampling({"top_p": 0.5}) == Sampling(temperature=0.8, top_p=0.5, top_k=20)
    assert published.sampling({"top_k": 0, "temperature": 0.0}) == Sampling(temperature=0.0, top_p=0.95, top_k=None)
    assert published_sampling(publish(tmp_path, {"top_k": 0})).sampling({}).top_k is None


def test_do_sample_false_is_greedy_until_a_temperature_is_given(tmp_path: Path) -> None:
    published = published_sampling(publish(tmp_path, DBRX | {"do_sample": False}))
    assert published.sampling({}) == Sampling(temperature=0.0, top_p=0.95, top_k=50, repetition_penalty=1.01)
    assert published.sampling({"temperature": 0.5, "top_p": 0.9}).temperature == 0.5
    for setting in ({"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}):
        with pytest.raises(InputError, match="give a temperature too"):
            published.sampling(setting)


def test_a_temperature_counts_where_nothing_is_said_of_sampling(tmp_path: Path) -> None:
    assert published_sampling(publish(tmp_path, {"temperature": 0.3})).sampling({}).temperature == 0.3
    only_ids = {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "5"}
    published = published_sampling(publish(tmp_path, only_ids))
    assert published == Published(stop_ids=frozenset({2}))


def test_what_would_change_the_next_token_and_is_not_applied_is_told(tmp_path: Path) -> None:
    neutral = {key: values[0] if values else None for key, values in NOT_APPLIED.items()}
    assert published_sampling(publish(tmp_path, neutral)).not_applied == ()
    said = DBRX | {"num_beams": 4, "typical_p": 0.5, "min_p": 0.05, "max_length": 8192, "use_cache": True}
    published = published_sampling(publish(tmp_path, said))
    assert published.not_applied == ("num_beams=4", "typical_p=0.5")
    assert published.sampling({}).min_p == 0.05
    assert published.sampling({"min_p": 0.1}).min_p == 0.1


def test_transformers_defaults_are_among_the_values_that_change_nothing(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    said = {key: defaults[key] for key in NOT_APPLIED if key in defaults}
    assert len(said) > 10
    assert published_sampling(publish(tmp_path, said)).not_applied == ()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"temperature": True}, "temperature=True must be a number"),
        ({"temperature": -1}, r"temperature=-1\.0 must be 0 \(greedy\)"),
        ('{"temperature": NaN}', "temperature=nan must be finite"),
        ('{"top_p": 1e999}', "top_p=inf must be finite"),
        ('{"temperature": 1' + "0" * 400 + "}", "temperature=inf must be finite"),
        ({"top_p": 0}, r"top_p=0\.0 must be above 0"),
        ({"top_p": 1.5}, r"top_p=1\.5 must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1 must be a whole number"),
        ({"top_k": 50.0}, r"top_k=50\.0 must be a whole number"),
        ({"min_p": 1.5}, r"min_p=1\.5 must be from 0"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty=1e-300 must be from 0.01 to 100"),
        ({"do_sample": "false"}, "do_sample='false' must be true or false"),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id=\[1, '2'\] must be a token id"),
        ({"eos_token_id": -1}, "eos_token_id=-1 must be a token id"),
        ({"eos_token_id": "\x1b[31m" + "x" * 999}, r"eos_token_id='\\x1b"),
    ],
)
def test_an_impossible_value_is_refused_in_one_line_that_names_the_file(
    said: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        published_sampling(publish(tmp_path, said))
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'generation_config.json'}: ")
    assert told.isprintable()
    assert len(told) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("said", ["{", "[1]", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_file_without_a_json_object_is_damaged(said: str, tmp_path: Path) -> None:
    publish(tmp_path, "").joinpath("generation_config.json").write_bytes(said.encode("latin-1"))
    with pytest.raises(Failure, match=r"generation_config\.json is "):
        published_sampling(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from([*DBRX, "eos_token_id", *NOT_APPLIED]), json_values))
def test_any_file_gives_usable_settings_or_an_error_with_its_name(said: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        told = f"{folder}/generation_config.json: "
        try:
            published_sampling(publish(Path(folder), said)).sampling({})
        except InputError as refused:
            told = str(refused)
    assert told.startswith(f"{folder}/generation_config.json: ")
    assert "\n" not in told
