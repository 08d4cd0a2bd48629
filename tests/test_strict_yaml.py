"""YAML by the core schema of version 1.2: the specification's own examples, and whatever we write comes back."""

import math
import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gristmill.strict_yaml import MAX_VALUES, dump_yaml, load_yaml

TEXT = st.text(st.characters(blacklist_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
NOTATIONS = st.text(string.digits + "+-.:_eExXoObBaAfFnNyYtTrRuUsSlL~<=", max_size=8)


@given(st.recursive(SCALARS | NOTATIONS, lambda inner: st.lists(inner) | st.dictionaries(TEXT | NOTATIONS, inner)))
def test_what_is_written_is_read_again_as_the_same(value: object) -> None:
    assert load_yaml(dump_yaml(value)) == value


@given(NOTATIONS)
def test_text_that_is_written_means_the_same_to_readers_of_yaml_1_1(text: str) -> None:
    assert yaml.safe_load(dump_yaml([text])) == [text]


@given(st.text(st.sampled_from("ab01 \n\t:-,[]{}&*!|>'\"%@`#?~<=.\\xuU\0\ufeff\ud800\u2028"), max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    said = ""
    try:
        load_yaml(text)
    except ValueError as problem:
        said = str(problem)
    assert len(said.splitlines()) <= 1


@pytest.mark.parametrize(  # https://yaml.org/spec/1.2.2/#103-core-schema, example 10.9, and what 1.1 reads otherwise
    ("text", "value"),
    [
        ("[null, Null, NULL, ~, ]", [None] * 4),
        ("[true, True, false, FALSE]", [True, True, False, False]),
        ("[0, 0o7, 0x3A, -19, +07, 089]", [0, 7, 58, -19, 7, 89]),
        ("[0., -0.0, .5, +12e03, -2E+05, 1e3]", [0.0, 0.0, 0.5, 12000.0, -200000.0, 1000.0]),
        ("[.inf, -.Inf, +.INF]", [math.inf, -math.inf, math.inf]),
        ("[yes, on, Off, n, 1:30, 1_000, 0b11, 2001-12-14, =, tRUE, 0o8, '1', nan, inf]",
         ["yes", "on", "Off", "n", "1:30", "1_000", "0b11", "2001-12-14", "=", "tRUE", "0o8", "1", "nan", "inf"]),
        ("[!!str 12, !!int '12', ! 12]", ["12", 12, 12]),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("", None),
    ],
)  # fmt: skip
def test_the_core_schema_is_kept(text: str, value: object) -> None:
    found = load_yaml(text)
    assert found == value
    assert repr(found).replace("-0.0", "0.0") == repr(value)


def test_aliases_of_aliases_do_not_multiply_without_end() -> None:
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30))]
    with pytest.raises(ValueError, match=f"more than {MAX_VALUES:,} values"):
        load_yaml("\n".join(lines))


@pytest.mark.parametrize("text", ["9" * 5000, "0x" + "f" * 5000, str(2**63), str(-(2**63) - 1)])
def test_an_integer_of_more_than_64_bits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^line 2: .* is too large: an integer must fit in 64 bits$"):
        load_yaml(f"a: 1\nb: {text}")
    assert load_yaml(str(-(2**63))) == -(2**63)
