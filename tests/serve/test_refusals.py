"""What is wrong is refused by name, with 4xx in OpenAI's shape; nothing that a client sends is a mistake of ours."""

import json
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import HTTP, Direct, Running

from gristmill.serve.errors import ErrorBody
from gristmill.serve.schema import REFUSED, ChatBody, CompletionBody

HUGE = {"enum": ["a"] * 40_000}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 1}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
# All parameters in OpenAI's documentation.
OPENAI_COMPLETIONS = (
    "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream "
    "stream_options suffix temperature top_p user"
)
OPENAI_CHAT = (
    "messages model audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
    "max_tokens metadata modalities n parallel_tool_calls prediction presence_penalty prompt_cache_key "
    "reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options temperature "
    "tool_choice tools top_logprobs top_p user verbosity web_search_options"
)


def refused(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    ErrorBody.model_validate(answer.json(), strict=True, extra="forbid")
    return dict(answer.json()["error"])


def schema(it: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": it}}


def test_every_parameter_of_openai_is_honoured_or_refused_with_a_reason() -> None:
    for names, kind in ((OPENAI_COMPLETIONS, CompletionBody), (OPENAI_CHAT, ChatBody)):
        assert set(names.split()) <= {*kind.model_fields, *REFUSED}
        assert not set(kind.model_fields) & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_supported_is_refused_by_name(server: Running, name: str) -> None:
    for path, body in PATHS.items():
        error = refused(server.post(path, {**body, name: "something special"}))
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert REFUSED[name][1] in error["message"]
        assert server.post(path, {**body, name: None}).status_code == 200


def test_an_unknown_parameter_is_refused_by_name_wherever_it_stands(server: Running) -> None:
    for path, body in PATHS.items():
        assert refused(server.post(path, {**body, "temprature": 1}))["param"] == "temprature"
        for options in ({"include_usages": True}, {"include_obfuscation": True}):
            error = refused(server.post(path, {**body, "stream": True, "stream_options": options}))
            assert error["param"] == f"stream_options.{next(iter(options))}"
    message = {"role": "user", "content": "a"}
    for more in ({"name": "me"}, {"tool_calls": [{}]}, {"weight": 1}):
        error = refused(server.post("/v1/chat/completions", {**CHAT, "messages": [message, {**message, **more}]}))
        assert error["param"] == f"messages[1].{next(iter(more))}"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", [1, None, ["tiny"], {}]),
        ("temperature", [-0.1, 2.1, "1", True, 1e-9, [1]]),
        ("top_p", [0, 1.1, "1"]),
        ("top_k", [-1, 1.5]),
        ("min_p", [-1, 2]),
        ("repetition_penalty", [0, 101]),
        ("presence_penalty", [-2.1, 2.1, "1"]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("n", [0, 129, 1.5, "1", True, 10**30]),
        ("seed", [2**63, -(2**63) - 1, 1.5, "1"]),
        ("stop", ["", [""], ["a"] * 17, "a" * 257, 1, [1], {}]),
        ("stream", [1, "true"]),
        ("stream_options", [{"include_usage": True}, True]),
        ("max_tokens", [-1, 1.5, "1", True]),
        (
            "logit_bias",
            [{"65": 101}, {"a": 1}, {"-1": 1}, {"65": "1"}, [1], {"1e3": 1}, {str(i): 1 for i in range(1025)}],
        ),
        ("user", [1, "a" * 257]),
    ],
)
def test_wrong_values_are_refused_by_name(server: Running, name: str, values: list[Any]) -> None:
    for path, body in PATHS.items():
        for value in values:
            error = refused(server.post(path, {**body, name: value}))
            said = error["param"] or error["message"]
            assert said.startswith(name), error


def test_wrong_values_of_one_api_are_refused_by_name(server: Running) -> None:
    for path, name, values in (
        ("/v1/completions", "prompt", [1, None, [], [[]], [1, "a"], [True], {}, [-1], ["a"] * 129, [["a"]]]),
        ("/v1/completions", "logprobs", [-1, 21, True]),
        ("/v1/completions", "echo", [1]),
        ("/v1/chat/completions", "messages", [None, [], "a", [1], [{}], [{"role": "user"}], [[]]]),
        ("/v1/chat/completions", "messages", [[{"role": r, "content": "a"}] for r in ("tool", "function", "", 1)]),
        ("/v1/chat/completions", "messages", [[{"role": "user", "content": c}] for c in (1, [], [{"type": "a"}])]),
        ("/v1/chat/completions", "max_tokens", [0]),
        ("/v1/chat/completions", "logprobs", [3, "true"]),
        ("/v1/chat/completions", "top_logprobs", [21, -1, 3]),  # without logprobs
        ("/v1/chat/completions", "response_format", [{"type": "yaml"}, "text", {"type": "json_schema"}]),
        ("/v1/chat/completions", "response_format", [schema({"not": {}}), schema({"type": 1}), schema(HUGE)]),
    ):  # fmt: skip
        for value in values:
            error = refused(server.post(path, {**PATHS[path], name: value}))
            assert (error["param"] or error["message"]).startswith(name), error
    both = {**CHAT, "max_completion_tokens": 1}
    assert refused(server.post("/v1/chat/completions", both))["param"] == "max_tokens"
    many = {**COMPLETION, "prompt": ["a"] * 65, "n": 2}
    assert refused(server.post("/v1/completions", many))["param"] == "n"
    high = {**COMPLETION, "prompt": [320]}
    assert "outside of 0 to 319" in refused(server.post("/v1/completions", high))["message"]
    assert refused(server.post("/v1/detokenize", {"model": "tiny", "tokens": [320]}))["param"] == "tokens"
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        assert refused(server.post("/v1/tokenize", {"model": "tiny", **body}))["param"] == "prompt"


BODIES = [
    *(b"", b" ", b"{", b"null", b"true", b"1", b"NaN", b"[]", b'"a"', b"\xff\xfe", b"\x00", b"{}x", b"{'a': 1}"),
    *(b'{"model": NaN}', b'{"model": "tiny", "prompt": "a", "temperature": NaN}'),
    *(
        b'{"model": "tiny", "prompt": "a", "temperature": %s}' % x
        for x in (b"1e999", b"-1e999", b"Infinity", b"9" * 9999)
    ),
    *(b'{"model": "tiny", "prompt": "%s"}' % x for x in (rb"\ud800", rb"\udc00x", b"\xed\xa0\x80", b"\n")),
    *(b"[" * 10_000, b'{"a":' * 10_000, b'{"model": "tiny", "prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    b'{"model": "tiny", "prompt": [' + b",".join([b"true"] * 300_000) + b"]}",
    b'{"model": "../../etc/passwd", "prompt": 1}',
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/tokenize", "/v1/detokenize"])
def test_a_body_that_is_no_request_is_refused(server: Running, path: str) -> None:
    for body in BODIES:
        refused(server.post(path, body))


def test_prompts_that_do_not_fit_say_so(server: Running, client: openai.OpenAI) -> None:
    for path, body in (
        ("/v1/completions", {**COMPLETION, "prompt": "a" * 1_000_000}),
        ("/v1/completions", {**COMPLETION, "max_tokens": 2047}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "é" * 100_000}]}),
    ):
        error = refused(server.post(path, body))
        assert error["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="context is 2048 tokens"):
        client.completions.create(model="tiny", prompt="a", max_tokens=4000)


def test_bodies_have_a_limit_and_a_type(server: Running) -> None:
    refused(server.post("/v1/completions", b" " * ((2 << 20) + 1)), 413)
    parts = (b" " * 65536 for _ in range(64))  # without a length
    json_type = {"content-type": "application/json"}
    refused(HTTP.post(f"{server.url}/v1/completions", content=parts, headers=json_type), 413)
    for headers in ({"content-type": "text/plain"}, {"content-type": ""}, {"content-encoding": "gzip"}):
        refused(server.post("/v1/completions", COMPLETION, headers=headers), 415)
    assert server.post(
        "/v1/completions", COMPLETION, headers={"content-type": "Application/JSON; charset=utf-8"}
    ).is_success


def test_a_header_has_a_limit_also_when_it_comes_at_once(server: Running) -> None:
    for path in ("/health", "/v1/models"):
        refused(server.get(path, headers={"x": "y" * 40_000}), 400)


def test_who_sends_a_body_that_is_too_large_hears_of_it(server: Running) -> None:
    """An answer before all was read could be thrown away by the client's own TCP."""
    refused(server.post("/v1/completions", b" " * (24 << 20)), 413)


def test_what_is_not_there_is_an_error_of_the_same_shape(server: Running) -> None:
    for path in ("/page", "/v1", "/v1/completions/", "/docs", "/v1/embeddings"):
        assert refused(server.get(path), 404)["code"] == "unknown_url"
    for path in PATHS:
        assert refused(server.get(path), 405)["code"] == "method_not_allowed"
    refused(server.post("/health", {}), 405)
    for name in ("..", "../tiny", "%2e%2e/tiny", "tiny/", "a" * 5000):
        answer = server.get(f"/v1/models/{name}")
        refused(answer, 404)


def test_a_base_model_says_that_it_holds_no_conversation(serving: Any, served: Any) -> None:
    with serving(served(no_chat="this model has no chat template: it continues texts")) as running:
        error = refused(running.post("/v1/chat/completions", CHAT))
        assert (error["param"], error["code"]) == ("messages", "no_chat_template")
        assert "continues texts" in error["message"]
        assert running.post("/v1/completions", COMPLETION).is_success
        assert running.get("/v1/models/tiny").json()["chat"] is False


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*ChatBody.model_fields, *CompletionBody.model_fields, *REFUSED, "other"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS, JSON, max_size=3))
def test_no_value_anywhere_is_a_mistake_of_the_server(server: Running, changes: dict[str, Any]) -> None:
    for path, body in PATHS.items():
        answer = server.post(path, json.dumps({**body, **changes}).encode("utf-8", "surrogatepass"))
        assert answer.status_code in (200, 400, 404), answer.text
        if not answer.is_success:
            refused(answer, answer.status_code)


def test_after_all_that_the_next_good_answer_is_the_same(server: Running, direct: Direct) -> None:
    body = {**COMPLETION, "max_tokens": 16, "temperature": 0}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == direct.ask(direct.text_ids("a"))[0][0]
