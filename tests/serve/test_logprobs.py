"""Log-probabilities as clients read them: one entry for each token, whatever ended the answer, on both routes."""

import json
import random
from typing import Any

import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import Direct, Running

from gristmill.inference.scorer import causal
from gristmill.model import Transformer
from gristmill.serve.answers import Place, token_text
from gristmill.tokenizer import Tokenizer

PROMPT = "The miller's daughter"
SPELLED = "the miller: \N{EAR OF RICE} said\n"


def spell(tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """A bias towards the tokens of a text; a random model would hardly make any of them."""
    return {str(id): 30.0 for id in tokenizer.encode(text)}


def entries(choice: dict[str, Any]) -> list[str]:
    told = choice["logprobs"]
    if "content" in told:
        assert all(one["logprob"] <= 0 for one in told["content"])
        return [one["token"] for one in told["content"]]
    lengths = {len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert lengths == {len(told["tokens"])}
    assert told["text_offset"] == sorted(told["text_offset"])
    return list(told["tokens"])


def chunks(answer: bytes) -> list[dict[str, Any]]:
    *events, done, end = answer.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def ask(server: Running, path: str, **settings: Any) -> dict[str, Any]:
    if path == "/v1/completions":
        body = {"prompt": PROMPT, "logprobs": 0}
    else:
        body = {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True}
    answer = server.post(path, {"model": "tiny", "max_tokens": 24, "seed": 3, **body, **settings})
    assert answer.is_success, answer.text
    return dict(answer.json())


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(chance=st.randoms(use_true_random=False))
def test_the_offset_of_a_whole_token_is_its_place_in_the_text(direct: Direct, chance: random.Random) -> None:
    """Also after bytes that never become a character: the text has U+FFFD for them."""
    tokenizer, place = direct.tokenizer, Place(direct.tokenizer.stream_decoder())
    ids = chance.choices(range(tokenizer.vocab_size), k=12)
    text, offsets = tokenizer.decode(ids), [place.pass_by(id) for id in ids]
    assert offsets == sorted(offsets)
    for id, offset in zip(ids, offsets, strict=True):
        token = token_text(tokenizer, id)
        assert token.startswith("bytes:") or text[offset : offset + len(token)] == token


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    start=st.integers(0, 12),
    length=st.integers(0, 9),
    n=st.integers(1, 3),
    ends=st.booleans(),
    seed=st.integers(0, 99),
)
def test_there_are_as_many_entries_as_tokens_and_they_cover_the_text(
    server: Running, tokenizer: Tokenizer, path: str, start: int, length: int, n: int, ends: bool, seed: int
) -> None:
    bias = spell(tokenizer, SPELLED) | ({str(tokenizer.im_end_id): 26.0} if ends else {})
    asked: dict[str, Any] = {"n": n, "seed": seed, "logit_bias": bias}
    stop = text_of(ask(server, path, **asked)["choices"][0])[start : start + length]
    if stop:
        asked["stop"] = ["never said", stop]
    answer = ask(server, path, **asked)
    assert sum(len(entries(choice)) for choice in answer["choices"]) == answer["usage"]["completion_tokens"]
    for choice in answer["choices"]:
        tokens = entries(choice)
        if not any(token.startswith("bytes:") for token in tokens):
            assert "".join(tokens).startswith(text_of(choice))
    streamed = chunks(server.post(path, {**body_of(path), **asked, "stream": True}).content)
    for choice in answer["choices"]:
        mine = [one for chunk in streamed for one in chunk["choices"] if one["index"] == choice["index"]]
        joined: list[Any] = []
        for one in mine:
            joined += (one["logprobs"] or {}).get("content") or (one["logprobs"] or {}).get("token_logprobs") or []
        told = choice["logprobs"]
        assert joined == (told.get("content") or told.get("token_logprobs") or [])


def body_of(path: str) -> dict[str, Any]:
    common = {"model": "tiny", "max_tokens": 24}
    if path == "/v1/completions":
        return {**common, "prompt": PROMPT, "logprobs": 0}
    return {**common, "messages": [{"role": "user", "content": PROMPT}], "logprobs": True}


@torch.no_grad()
def test_a_client_that_slices_by_position_gets_the_whole_continuation_also_at_the_end_of_a_document(
    server: Running, model: Transformer, tokenizer: Tokenizer, direct: Direct
) -> None:
    """As lm-eval's local-completions: ids, echo, one token more, and [len(context):-1] of the entries."""
    context, continuation = direct.text_ids("The mill"), tokenizer.encode(" is fine.\n")
    ids = context + continuation
    hidden, _ = model(torch.tensor([ids]), torch.arange(len(ids))[None], causal)
    logprobs_TV = model.logits(hidden)[0].double().log_softmax(-1)
    wanted = [float(logprobs_TV[n - 1, ids[n]]) for n in range(len(context), len(ids))]
    for next_id in (None, tokenizer.eot_id, tokenizer.im_end_id, tokenizer.pad_id):
        body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        bias = {} if next_id is None else {str(next_id): 100}
        [choice] = server.post("/v1/completions", {**body, "logit_bias": bias}).json()["choices"]
        told = choice["logprobs"]["token_logprobs"]
        assert len(told) == len(ids) + 1
        assert told[0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert told[len(context) : -1] == pytest.approx(wanted, abs=1e-4)


def test_the_first_echoed_token_has_no_log_probability_in_any_answer(server: Running, direct: Direct) -> None:
    body = {"model": "tiny", "prompt": [direct.tokenizer.encode("mill"), direct.tokenizer.encode("a b")], "n": 2}
    for max_tokens in (0, 2):
        answer = server.post("/v1/completions", {**body, "echo": True, "logprobs": 0, "max_tokens": max_tokens}).json()
        assert len(answer["choices"]) == 4
        for choice in answer["choices"]:
            told = choice["logprobs"]["token_logprobs"]
            assert [value is None for value in told] == [True] + [False] * (len(told) - 1)
        prompt = sum(len(ids) for ids in body["prompt"]) * 2  # type: ignore[misc, attr-defined]
        assert sum(len(entries(c)) for c in answer["choices"]) == prompt + answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_control_tokens_are_text_only_where_they_are_asked_for(
    server: Running, tokenizer: Tokenizer, path: str
) -> None:
    bias = {str(tokenizer.pad_id): 20.0, str(tokenizer.encode("a")[0]): 20.0}
    answers = [ask(server, path, logit_bias=bias, skip_special_tokens=skips) for skips in (None, True, False)]
    plain, also, named = (answer["choices"][0] for answer in answers)
    assert entries(plain).count("<|pad|>") > 0
    assert entries(plain) == entries(also) == entries(named)
    assert text_of(plain) == text_of(also) == "".join(token for token in entries(plain) if token != "<|pad|>")
    assert text_of(named) == "".join(entries(named))
    if path == "/v1/chat/completions":
        pieces = [one["bytes"] for one in plain["logprobs"]["content"]]
        assert b"".join(bytes(piece or []) for piece in pieces).decode() == text_of(plain)
        assert None in pieces


def test_a_control_token_named_as_a_stop_text_stops(server: Running, tokenizer: Tokenizer) -> None:
    bias = {str(tokenizer.im_start_id): 100}
    for skips in (True, False):
        answer = ask(server, "/v1/completions", logit_bias=bias, stop=["<|im_start|>"], skip_special_tokens=skips)
        assert (text_of(answer["choices"][0]), answer["choices"][0]["finish_reason"]) == ("", "stop")
        assert answer["usage"]["completion_tokens"] == 1


def test_parts_of_characters_are_written_alike_on_all_routes(server: Running, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\N{WATERMELON}")
    assert len(ids) > 1
    bias = {str(id): 100.0 for id in ids[:1]}
    piece = tokenizer.decode_bytes(ids[:1])
    wanted = "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = ask(server, path, logit_bias=bias, max_tokens=3, return_experts=True)
        assert entries(answer["choices"][0]) == [wanted] * 3
        assert [one["token"] for one in answer["choices"][0]["experts"]] == [wanted] * 3
    top = ask(server, "/v1/chat/completions", logit_bias=bias, max_tokens=1, top_logprobs=20)
    for one in top["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        assert "\ufffd" not in one["token"]
    told = server.post("/v1/tokenize", {"model": "tiny", "prompt": "\N{WATERMELON}", "return_token_strs": True}).json()
    assert told["token_strs"][1] == wanted


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_with_ignore_eos_an_answer_has_all_its_tokens(server: Running, tokenizer: Tokenizer, path: str) -> None:
    bias = {str(tokenizer.eot_id): 30.0, str(tokenizer.im_end_id): 30.0, str(tokenizer.encode("a")[0]): 30.0}
    assert ask(server, path, logit_bias=bias)["choices"][0]["finish_reason"] == "stop"
    answer = ask(server, path, logit_bias=bias, ignore_eos=True, n=2)
    assert answer["usage"]["completion_tokens"] == 48
    for choice in answer["choices"]:
        assert (choice["finish_reason"], len(entries(choice))) == ("length", 24)
        assert set(text_of(choice)) <= {"a"}
    stopped = ask(server, path, logit_bias=bias, ignore_eos=True, stop="aa")["choices"][0]  # a stop text still stops
    assert (stopped["finish_reason"], "aa" in text_of(stopped)) == ("stop", False)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("include_usage", [True, False])
def test_usage_is_told_in_each_chunk_where_it_is_asked_for(server: Running, path: str, include_usage: bool) -> None:
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    body = {**body_of(path), "n": 2, "stream": True, "stream_options": options, "seed": 5, "ignore_eos": True}
    if path == "/v1/completions":
        body["echo"] = True
    streamed = chunks(server.post(path, body).content)
    usages = [chunk["usage"] for chunk in streamed]
    made = [usage["completion_tokens"] for usage in usages]
    assert made == sorted(made)
    assert made[-1] == 48
    whole = server.post(path, {name: body[name] for name in body if not name.startswith("stream")}).json()["usage"]
    for usage in usages:
        assert usage["prompt_tokens"] == whole["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (streamed[-1]["choices"] == []) == include_usage


def test_best_of_is_accepted_where_it_changes_nothing(server: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, n=2, best_of=2, logprobs=1, stop="e", max_tokens=4)
    assert len(answer.choices) == 2
    for body in ({"best_of": 3}, {"n": 2, "best_of": 1}, {"n": 2, "best_of": 3}):
        refused = server.post("/v1/completions", {"model": "tiny", "prompt": "a", **body})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")


def test_ignore_eos_does_not_go_with_a_schema(server: Running) -> None:
    body = {**body_of("/v1/chat/completions"), "ignore_eos": True, "response_format": {"type": "json_object"}}
    refused = server.post("/v1/chat/completions", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "ignore_eos")
