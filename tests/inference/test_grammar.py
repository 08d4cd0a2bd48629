"""Whatever the model would say, the answer has the form that was asked for."""

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr

from gristmill.errors import InputError
from gristmill.inference import (
    ANY_OBJECT,
    Engine,
    EngineConfig,
    Grammar,
    JsonSchema,
    Regex,
    Request,
    Sampling,
    llguide,
    read_schema,
)
from gristmill.inference.grammar import Grammars
from gristmill.inference.sampler import pick
from gristmill.model import Transformer
from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer

Tiny = Callable[..., Transformer]
VOCAB = 300  # of the model, of which the tokenizer has no token for the last ids
TEXT = 'The mill stands by the river. {"name": "mill", "wheels": [1, 2.5, true, null]} ' * 9
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from((0.0, 0.5, 1.0, 3.0)),
    top_k=st.sampled_from((None, 1, 5)),
    top_p=st.sampled_from((0.1, 0.9, 1.0)),
    min_p=st.sampled_from((0.0, 0.5)),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder, out = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("tokenizer")
    table = pa.table({"id": ["0"], "source": ["prose"], "text": [TEXT], "num_bytes": [len(TEXT)]})
    for split in ("train", "validation", "test"):
        pq.write_table(table, folder / f"documents-{split}.parquet")
    build_tokenizer(TokenizerConfig(vocab_size=285), folder, out)
    return Tokenizer.load(out)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB)


def said(grammars: Grammars, grammar: Grammar, sampling: Sampling, seed: int) -> str:
    """An answer to random logits, by steps more in favour of what ends things."""
    pieces, generator = grammars.tokenizer.text_pieces, torch.Generator().manual_seed(seed)
    constraint, made = grammars.start(grammar, frozenset()), b""
    ending = torch.tensor([piece in (b'"', b"]", b"}", b"x", b"") for piece in pieces] + [True] * (VOCAB - len(pieces)))
    for step in range(3000):
        logits_V = torch.randn(VOCAB, generator=generator) * 3 + ending * step / 8
        allowed_V = constraint.allowed()
        assert allowed_V is not None
        id = pick(logits_V, sampling, float(torch.rand(1, generator=generator)), None, allowed_V)
        if id == grammars.tokenizer.eot_id:
            return made.decode()
        assert pieces[id], f"{id} is no token of a text"
        made += pieces[id]
        constraint.add(id)
    raise AssertionError(f"it does not end: {made[:300]!r}")


def number(text: str) -> Fraction:
    return Fraction(re.sub(r"[1-9]\d{3,}$", "999", text) if "e" in text.lower() else text)  # of a size to compute with


def check(schema: Any, answer: str) -> None:
    """By another library; numbers as they are written, not as floats that round onto a bound."""
    value = json.loads(answer, parse_float=number, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema.Draft202012Validator(schema).validate(value)


NAMES = st.sampled_from(("a", "b", "long name", 'quo"te', "é", "c/d", "\n"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.sampled_from((0.5, -2.25)) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


def with_type(name: str, **keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return some(**keys).map(lambda schema: {"type": name, **schema})


SMALL, BOUND = st.integers(0, 4), st.integers(-50, 50) | st.sampled_from((0.5, -7.25, 1000))
GROUND = st.one_of(
    st.sampled_from(({"type": "null"}, {"type": "boolean"}, {"type": ["null", "integer"]})),
    with_type("integer", minimum=BOUND, exclusiveMaximum=BOUND, multipleOf=st.integers(1, 12)),
    with_type("number", exclusiveMinimum=BOUND, maximum=BOUND),
    with_type("string", minLength=SMALL).map(lambda schema: {**schema, "maxLength": schema.get("minLength", 0) + 4}),
    with_type(
        "string", pattern=st.sampled_from(("^[a-f]{2,5}$", "x", "^(ab|cd)*$", "^\\d{4}-\\d\\d$", "^[a-z]{0,2}[éß]$"))
    ),
    with_type("string", format=st.sampled_from(("date", "ipv4", "uuid", "no such format", "password"))),
    with_type("array", uniqueItems=st.just(False)),
    VALUES.map(lambda value: {"const": value}),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)
SHARED = {"$ref": "#/$defs/shared"}
LEAVES = st.just(SHARED) | GROUND


# Nothing keeps to these; an answer may do without them where another branch remains.
UNSUPPORTED = st.sampled_from(
    (
        {"type": "string", "pattern": "^(?!a).*$"},
        {"type": "array", "items": {}, "uniqueItems": True},
        {"type": "object", "contains": {}, "dependentRequired": {"a": ["b"]}},
        {"type": "array", "contains": {"type": "null"}},
    )
)
KEYS = st.sampled_from(
    (True, {}, {"type": "string"}, {"pattern": "^a"}, {"enum": ["x", "y"]}, {"const": "k"}, {"minLength": 2})
)


def tagged(name: str, inner: Any) -> dict[str, Any]:
    """As generators write the branches of a discriminated union."""
    return {"type": "object", "properties": {"kind": {"const": name}, "rest": inner}, "required": ["kind"]}


def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(NAMES, inner, max_size=3)
    return st.one_of(
        with_type("array", items=inner, minItems=SMALL, maxItems=SMALL),
        with_type("array", prefixItems=st.lists(inner, min_size=1, max_size=3), items=st.just(False)),
        with_type(
            "object",
            properties=properties,
            required=st.lists(NAMES, unique=True, max_size=2),
            additionalProperties=st.just(False) | inner,
            maxProperties=SMALL,
        ),
        with_type(
            "object", patternProperties=inner.map(lambda s: {"^p[0-9]$": s}), additionalProperties=st.just(False)
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas}),
        st.tuples(inner, UNSUPPORTED).flatmap(st.permutations).map(lambda schemas: {"anyOf": schemas}),
        st.lists(inner, min_size=2, max_size=3).map(lambda schemas: {"oneOf": schemas}),
        st.tuples(inner, inner).map(lambda two: {"oneOf": [tagged("a", two[0]), tagged("b", two[1])]}),
        with_type("object", propertyNames=KEYS, additionalProperties=st.just(False) | inner, required=st.just([])),
        st.lists(inner, min_size=1, max_size=2).map(lambda schemas: {"allOf": schemas}),
    )


# A reference to itself stands within an array: the specification forbids a schema that loops on the same value, and
# the checker would not end.
SCHEMAS = st.tuples(
    st.recursive(LEAVES, composed, max_leaves=6), st.just({"type": "array", "items": SHARED}) | GROUND
).map(lambda two: {**two[0], "$defs": {"shared": {"anyOf": [{"type": "null"}, two[1]]}}})


@settings(max_examples=max(500, settings().max_examples), suppress_health_check=list(HealthCheck))
@given(SCHEMAS, SAMPLINGS, st.integers(0, 999))
def test_an_answer_is_valid_for_its_schema(
    grammars: Grammars, schema: dict[str, Any], sampling: Sampling, seed: int
) -> None:
    try:
        grammars.compile(JsonSchema(schema))
    except InputError:  # no value is valid for it, or nobody can promise one
        reject()
    check(schema, said(grammars, JsonSchema(schema), sampling, seed))


ATOMS = st.sampled_from(
    (
        "a",
        "bc",
        "[a-c]",
        "[^x\\s]",
        "\\d",
        "[\\w-]",
        "a*",
        "\\d+",
        ".",
        "/",
        "\n",
        '"',
        "\\\\",
        "é",
        "\\.",
        " ",
        "{'",
        "<|pad|>",
    )
)
PATTERNS = st.recursive(
    ATOMS.map(lambda atom: atom.replace("{", "\\{").replace("|", "\\|")),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(("?", "{2}", "{0,3}", "{1,2}"))).map(lambda p: f"({p[0]}){p[1]}"),
    ),
    max_leaves=8,
)


@given(PATTERNS, SAMPLINGS, st.integers(0, 999))
def test_an_answer_matches_its_regular_expression(
    grammars: Grammars, pattern: str, sampling: Sampling, seed: int
) -> None:
    answer = said(grammars, Regex(pattern), sampling, seed)
    assert re.fullmatch(pattern, answer, re.ASCII), answer


@given(st.lists(st.text('ab{" é', max_size=6), min_size=1, max_size=8), st.booleans(), st.integers(0, 999))
def test_just_the_tokens_are_allowed_after_which_one_of_the_texts_can_come(
    grammars: Grammars, texts: list[str], as_json: bool, seed: int
) -> None:
    grammar = JsonSchema({"enum": texts}) if as_json else Regex("|".join(f"({re.escape(text)})" for text in texts))
    wanted = {(json.dumps(text, ensure_ascii=False) if as_json else text).encode() for text in texts}
    pieces, eot, chance = grammars.tokenizer.text_pieces, grammars.tokenizer.eot_id, random.Random(seed)
    constraint, made = grammars.start(grammar, frozenset()), b""
    while True:
        allowed_V = constraint.allowed()
        assert allowed_V is not None
        allowed = set(allowed_V.nonzero()[:, 0].tolist())
        can_come = {id for id, p in enumerate(pieces) if p and any(text.startswith(made + p) for text in wanted)}
        assert allowed == can_come | ({eot} if made in wanted else set())
        id = chance.choice(sorted(allowed))
        if id == eot:
            return
        made += pieces[id]
        constraint.add(id)


def engine(model: Transformer, tokenizer: Tokenizer, **changes: Any) -> Engine:
    return Engine(model, EngineConfig(**{"cache_tokens": 2048, **changes}), tokenizer)


def answers(busy: Engine, request: Request) -> list[tuple[str, list[int], Any]]:
    """Of each choice the text, the ids and how it ended."""
    stream = busy.submit(request)
    pieces = list(stream)
    return [
        (
            "".join(piece.text for piece in pieces if piece.choice == n),
            [token.id for piece in pieces if piece.choice == n for token in piece.tokens],
            next(piece.finish for piece in pieces if piece.choice == n and piece.finish),
        )
        for n in range(request.n)
    ]


POINT = JsonSchema(
    {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}, "name": {"enum": ["mill", "river"]}},
        "required": ["x", "name"],
        "additionalProperties": False,
    }
)


def test_a_constrained_answer_is_the_same_alone_and_in_any_company_and_after_preemption(
    tiny: Tiny, tokenizer: Tokenizer
) -> None:
    model, preemptions, chance = tiny(max_seq_len=256), 0, random.Random(0)
    for sampling in (Sampling(temperature=0.0), Sampling(seed=5)):
        request = Request(prompt=[9] * 20, max_tokens=60, n=3, sampling=sampling, grammar=POINT, priority=1, logprobs=2)
        alone = answers(engine(model, tokenizer), request)
        for text, _, finish in alone:
            assert finish == "stop"
            check(POINT.schema, text)
        for _ in range(3):
            busy = engine(model, tokenizer, cache_tokens=128, token_budget=16, max_running=chance.choice((3, 8)))
            stream = busy.submit(request)
            for _ in range(chance.choice((4, 9, 20))):
                busy.step()
            for seed in range(4):
                crowd = Request(prompt=[seed, 3, 4] * 9, max_tokens=20, sampling=Sampling(seed=seed))
                busy.submit(replace(crowd, grammar=Regex("[ab]{18}") if seed % 2 else None))
            pieces = list(stream)
            together = ["".join(piece.text for piece in pieces if piece.choice == n) for n in range(3)]
            assert together == [text for text, _, _ in alone]
            preemptions += sum(choice.job.num_preemptions for choice in stream.choices)
    assert preemptions > 0


def test_no_prompt_and_no_bias_draws_a_control_token_or_an_id_without_one(tiny: Tiny, tokenizer: Tokenizer) -> None:
    model = tiny(max_seq_len=256)
    others = [id for id in range(VOCAB) if id >= tokenizer.vocab_size or not tokenizer.text_pieces[id]]
    wish = {id: 1000.0 for id in others if id != tokenizer.eot_id}
    assert {tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.pad_id, VOCAB - 1} <= set(wish)
    for number, said_before in enumerate(('{"x": 1}', "<|endoftext|>", 'no JSON, please: "', "")):
        for prompt in ([tokenizer.eot_id, *tokenizer.encode(said_before)], [*others, *tokenizer.encode(said_before)]):
            request = Request(
                prompt=prompt, max_tokens=60, n=2, sampling=Sampling(logit_bias=wish, seed=number), grammar=POINT
            )
            for text, ids, finish in answers(engine(model, tokenizer), request):
                assert finish == "stop"
                assert ids[-1] == tokenizer.eot_id
                assert not set(ids[:-1]) & set(others)
                check(POINT.schema, text)


def test_a_turn_may_end_it_where_its_text_may_end_and_nowhere_else(tiny: Tiny, tokenizer: Tokenizer) -> None:
    wish = Sampling(logit_bias={tokenizer.im_end_id: 1000.0}, temperature=0.0)
    request = Request(prompt=[5], stop_ids=frozenset({tokenizer.im_end_id}), sampling=wish, grammar=Regex("ab(cd)*"))
    [(text, _, finish)] = answers(engine(tiny(), tokenizer), request)
    assert (text, finish) == ("ab", "stop")


def test_an_answer_that_is_cut_says_so_and_a_stop_string_cuts_it(tiny: Tiny, tokenizer: Tokenizer) -> None:
    model = tiny()
    request = Request(prompt=[5], max_tokens=9, sampling=Sampling(temperature=0.0), grammar=Regex("a{20}b"))
    assert answers(engine(model, tokenizer), request) == [("a" * 9, [tokenizer.encode("a")[0]] * 9, "length")]
    [whole] = answers(engine(model, tokenizer), replace(request, max_tokens=21))
    assert (whole[0], whole[2]) == ("a" * 20 + "b", "length")  # nothing was left for its end
    [stopped] = answers(engine(model, tokenizer), replace(request, max_tokens=40, stop=("aab",)))
    assert (stopped[0], stopped[2]) == ("a" * 18, "stop")


def test_log_probabilities_are_the_models_own(tiny: Tiny, tokenizer: Tokenizer) -> None:
    busy = engine(tiny(), tokenizer)
    request = Request(prompt=[5, 6], max_tokens=30, sampling=Sampling(seed=1), logprobs=2, grammar=Regex("[a-z ]{12}"))
    told = [token for piece in busy.submit(request) for token in piece.tokens]
    sequence = [5, 6, *(token.id for token in told)]
    scored = [
        token
        for piece in busy.submit(Request(prompt=sequence, max_tokens=0, echo=True, logprobs=2))
        for token in piece.tokens
    ]
    assert told == scored[2:]


def test_any_json_object(tiny: Tiny, tokenizer: Tokenizer, grammars: Grammars) -> None:
    for seed in range(20):
        assert isinstance(json.loads(said(grammars, ANY_OBJECT, Sampling(), seed)), dict)


class Color(Enum):
    RED, GREEN = "red", "green"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    friend: "Pet | None"


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


class Generated(BaseModel):
    """What pydantic makes schemas of that have more than types."""

    price: Annotated[Decimal, Field(ge=0, le=9)]
    secret: SecretStr
    file: Path
    data: bytes
    when: date
    pet: Pet
    pair: tuple[int, bool]
    named: dict[Annotated[str, Field(pattern="^a[bc]*$")], int]
    colors: dict[Color, bool]
    short: dict[Annotated[str, Field(min_length=1, max_length=3)], None]


def test_schemas_that_pydantic_makes_are_kept_to(grammars: Grammars) -> None:
    schema = Generated.model_json_schema()
    _, text = schema["properties"]["price"]["anyOf"]
    text["pattern"] = "^(?!-?\\.?$)-?\\d*\\.?\\d*$"  # as earlier versions wrote it; the number remains
    assert {"propertyNames", "oneOf"} <= {key for key in ("propertyNames", "oneOf") if key in str(schema)}
    for seed in range(10):
        answer = said(grammars, JsonSchema(schema), Sampling(), seed)
        check(schema, answer)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "int64"},
        {"type": "integer", "format": "double", "uniqueItems": True, "pattern": "(?=a)", "propertyNames": False},
        {"type": "string", "contains": {}, "minContains": 2, "unevaluatedItems": False},
        {"then": False, "else": False, "maxContains": 0, "dependentRequired": {}, "unevaluatedProperties": True},
        {"type": "array", "items": {"type": "null"}, "maxItems": 1, "uniqueItems": True},
        {"type": "string", "nullable": True, "example": "a", "xml": {}, "x-order": 3, "contentEncoding": "base64"},
        {"type": "null", "$defs": {"unused": {"not": {}}}, "title": "t", "readOnly": True},
        {"$ref": "#/components/a", "components": {"a": {"type": "null"}}},
        {"const": {"not": {}, "minProperties": 7, "uniqueItems": True}},
        {"enum": [{"minProperties": 9}, "(?!a)"]},
        {"type": "object", "properties": {"not": {"type": "null"}, "if": {"type": "null"}}, "required": ["not", "if"]},
        {"anyOf": [{"$ref": "#/$defs/bad"}, {"type": "null"}], "$defs": {"bad": {"items": {"pattern": "(?!a)"}}}},
        {
            "anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}],
            "$defs": {"a": {"uniqueItems": True}, "b": {"items": {"$ref": "#/$defs/c"}}, "c": {"$ref": "#/$defs/a"}},
        },
    ],
)
def test_what_changes_nothing_or_can_be_done_without_is_accepted(grammars: Grammars, schema: Any) -> None:
    for seed in range(5):
        check(schema, said(grammars, JsonSchema(schema), Sampling(), seed))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def chained(length: int) -> dict[str, Any]:
    links = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "null"}}}


CIRCLE: dict[str, Any] = {}
CIRCLE["allOf"] = [CIRCLE]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"enum": list(range(100_000))}, "more than 65536 bytes"),
        (nested(40), "deeper than 64 levels"),
        (nested(900), "deeper than 64 levels"),
        (CIRCLE, "is no JSON"),
        ({"const": float("nan")}, "is no JSON"),
        ({"const": {1, 2}}, "is no JSON"),
        ([], "must be a JSON object"),
        ({"$ref": "#"}, "no text has this form"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "no text has"),
        (chained(1500), "more than 1 s, 128 MiB or the stack"),  # it overflows a stack
        ({"type": "integer", "multipleOf": 10**7 + 19}, "more than 1 s, 128 MiB or the stack"),
        ({"allOf": [{"anyOf": [{"properties": {f"{p}{n}": {}}} for p in "ab"]} for n in range(16)]}, "too large"),
        ({"type": "object", "properties": {f"p{n}": {} for n in range(1500)}}, "Current row has"),
        ({"type": "string", "pattern": "^(\\p{L}{1,100}){1,100}$", "minLength": 9}, "refused"),
        ({"$ref": "https://example.com/schema.json"}, "does not fetch"),
        ({"$ref": "file:///etc/hostname"}, "does not fetch"),
        ({"not": {"type": "null"}}, "has not at #, which is not supported: list what is allowed"),
        (
            {"properties": {"a": {"type": "array", "uniqueItems": True}}},
            "has uniqueItems at #/properties/a, .* maxItems",
        ),
        ({"if": {"type": "null"}, "then": False}, "has if at #, .* as anyOf"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"contains": {}}}}, "has contains at #/\\$defs/a, .* with items"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "has dependentRequired at #, .* in required"),
        ({"properties": {"a": {}}, "propertyNames": {"pattern": "^a"}}, "has propertyNames at #, .* no properties"),
        ({"patternProperties": {"^(?!a)": {}}}, "has look-around at #/patternProperties"),
        ({"pattern": "(a)\\1"}, "has a back-reference at #/pattern"),
        ({"anyOf": [{"not": {}}, {"uniqueItems": True}]}, "has not at #/anyOf/0"),
        ({"oneOf": [{"type": "number"}, {"anyOf": [{"pattern": "^(?!b)a$"}, {"type": "integer"}]}]}, "has look-around"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not supported"),
        ({"allOf": [{"type": "null"}, {"type": "string"}]}, "Unsatisfiable"),
        ({"type": "object", "minProperties": 2}, "minProperties=2 cannot be promised"),
        ({"allOf": [{"exclusiveMaximum": 0}, {"type": "number", "minimum": -0.5}]}, "write maximum with the number"),
        ({"x-guidance": {"lenient": True}}, "has x-guidance"),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"type": 5}, "refused"),
    ],
)
def test_hostile_schemas_are_refused(grammars: Grammars, schema: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        grammars.compile(JsonSchema(schema))
    assert said(grammars, Regex("ab"), Sampling(), 0) == "ab"  # and the next is served


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("a" * 65537, "has 65537 bytes"),
        ("\ud800", "lone surrogate"),
        ("(" * 20_000 + ")" * 20_000, "maximum number of nested"),
        ("(\\p{L}{1,100}){1,100}", "too many expressions"),
        ("(?=a)b", "look-around"),
        ("(a)\\1", "backreferences"),
        ("[", "unclosed"),
        ("a\\\\\\", "escapes nothing"),
        ("[^\\s\\S]", "no text has this form|refused"),
    ],
)
def test_hostile_patterns_are_refused(grammars: Grammars, pattern: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        grammars.compile(Regex(pattern))


@pytest.mark.parametrize(
    "pattern", ["(a|a)*b", "(a*)*b", "(x+x+)+y", "(.*a){20}", "[ab]*a[ab]{300}", "((a{1000}){1000})?b"]
)
def test_patterns_that_stall_other_engines_are_answered(grammars: Grammars, pattern: str) -> None:
    constraint = grammars.start(Regex(pattern), frozenset())
    chance = random.Random(0)
    for _ in range(100):
        allowed_V = constraint.allowed()
        assert allowed_V is not None
        ids = [id for id in allowed_V.nonzero()[:, 0].tolist() if id != grammars.tokenizer.eot_id]
        if not ids:
            return
        constraint.add(chance.choice(ids))


def test_a_grammar_that_grows_too_hard_ends_its_own_answer_alone(tiny: Tiny, tokenizer: Tokenizer) -> None:
    busy = engine(tiny(max_seq_len=256), tokenizer)
    hard = busy.submit(Request(prompt=[9], grammar=Regex("a{100}(\\p{L}{1,100}){1,100}")))
    easy = busy.submit(Request(prompt=[5], grammar=Regex("a{120}")))
    pieces = list(hard)
    assert "".join(piece.text for piece in pieces).startswith("a" * 99)
    assert pieces[-1].finish == "error"
    assert "".join(piece.text for piece in easy) == "a" * 120
    assert busy.scheduler.is_idle


def test_a_schema_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    for text, says in (
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be a JSON object"),
        (" " * 300_000, "more than 262144 bytes"),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises(InputError, match=f"schema.json.*{says}"):
            read_schema(file)
    file.write_text(json.dumps(POINT.schema, indent=4))
    assert read_schema(file) == POINT


def test_the_helper_is_started_again_when_someone_ends_it(grammars: Grammars) -> None:
    helper = llguide.helper()
    assert helper.problem(llguide.of_regex("a")) == ""
    assert helper._process is not None
    helper._process.kill()
    helper._process.wait()
    assert helper.problem(llguide.of_regex("b")) == ""


def test_without_a_tokenizer_or_the_package_the_error_says_so(
    tiny: Tiny, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(prompt=[1], grammar=Regex("not compiled before"))
    with pytest.raises(InputError, match="needs a tokenizer"):
        Engine(tiny()).submit(request)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=re.escape("pip install 'gristmill[structured]'")):
        engine(tiny(), tokenizer).submit(request)
