"""Claims about conversations: equal to apply_chat_template for harmless contents, closed to hostile ones."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import Failure
from gristmill.tokenizer import Tokenizer, hugging_face_config, published_system_prompt, write_gpt4
from gristmill.tokenizer import gpt4 as gpt4_module
from gristmill.tokenizer.layout import write_tokenizer

PROMPT = "You are Miller.\nYou answer in \"one\" line; never say '{{ 7 * 7 }}' or {% raw %} \\n. 🌾"
# The form of a published instruct template, with a prompt of our own.
PUBLISHED = (
    "{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% elif not 'system' in messages[0]['role'] %}{% set loop_messages = messages %}"
    "{% set system_message = 'You are Miller. ' 'You grind ' + 'grain.\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 %}{% if system_message != false %}"
    "{{ '<|im_start|>system\\n' + system_message | trim + '<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% else %}"
    "{{ '\\n' + '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endif %}"
    "{% if (add_generation_prompt == true and loop.last) %}{{ '\\n' + '<|im_start|>' + 'assistant' + '\\n' }}"
    "{% endif %}{% endfor %}"
)


def conversations(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    roles = st.sampled_from(["system", "user", "assistant"])
    return st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=4)


def auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def assert_chat_equals_apply_chat_template(ours: Tokenizer, theirs: Any, contents: st.SearchStrategy[str]) -> None:
    @given(conversation=conversations(contents), generation_prompt=st.booleans())
    def check(conversation: list[dict[str, str]], generation_prompt: bool) -> None:
        ids = theirs.apply_chat_template(conversation, add_generation_prompt=generation_prompt)["input_ids"]
        assert ours.chat(conversation, generation_prompt) == ids

    check()


def test_chat_with_gpt4s_table_equals_apply_chat_template(
    gpt4: Tokenizer, gpt4_auto: Any, texts: st.SearchStrategy[str]
) -> None:
    assert_chat_equals_apply_chat_template(gpt4, gpt4_auto, texts)


def test_chat_with_a_default_prompt_equals_apply_chat_template(
    tokenizer_dir: Path, tmp_path: Path, texts: st.SearchStrategy[str]
) -> None:
    write_tokenizer(tmp_path, (tokenizer_dir / "tokenizer.json").read_text(), PROMPT)
    assert_chat_equals_apply_chat_template(Tokenizer.load(tmp_path), auto(tmp_path), texts)


def test_the_default_system_prompt_opens_what_has_no_system_turn(
    gpt4: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt4_module, "tokenizer_json", lambda ranks: gpt4._description)  # it takes seconds to make
    write_gpt4(tmp_path, default_system_prompt=PROMPT)
    ours = Tokenizer.load(tmp_path)
    assert ours.default_system_prompt == PROMPT
    assert gpt4.default_system_prompt is None
    user, system = {"role": "user", "content": "Grind!"}, {"role": "system", "content": "Be brief."}
    assert ours.chat([user]) == gpt4.chat([{"role": "system", "content": PROMPT}, user])
    assert ours.chat([user], True)[-4:] == gpt4.chat([user], True)[-4:]
    assert ours.chat([system, user]) == gpt4.chat([system, user])


@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_default_prompt_survives_the_template(prompt: str) -> None:
    import jinja2

    template = hugging_face_config(prompt)["chat_template"]
    shown = jinja2.Environment().from_string(template).render(messages=[{"role": "user", "content": "x"}])
    assert shown == f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\nx<|im_end|>"
    assert published_system_prompt(template) == (prompt.strip() or None)


def test_the_default_prompt_of_a_published_template_is_found() -> None:
    assert published_system_prompt(PUBLISHED) == "You are Miller. You grind grain."
    assert published_system_prompt(hugging_face_config()["chat_template"]) is None


def test_the_found_prompt_gives_the_published_templates_conversations(gpt4: Tokenizer, gpt4_auto: Any) -> None:
    ours = Tokenizer(gpt4._description, published_system_prompt(PUBLISHED))
    user, system = {"role": "user", "content": "Grind!"}, {"role": "system", "content": "Be brief."}
    for turns in ([user], [system, user], [user, {"role": "assistant", "content": "Yes."}, user]):
        for generation_prompt in (False, True):
            theirs = gpt4_auto.apply_chat_template(
                turns, chat_template=PUBLISHED, add_generation_prompt=generation_prompt
            )
            assert ours.chat(turns, generation_prompt) == theirs["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{% set system_message = messages[0]['content'] %}",
        "{% set system_message = 'x' * 10 ** 10 %}",
        "{% set system_message = ''.__class__.__mro__[1].__subclasses__() %}",
        "{% set system_message = cycler.__init__.__globals__.os.popen('touch owned') %}",
        "{% set other = 'You are Miller.' %}",
        "{% set system_message = %}",
        "{% for %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% set system_message = " + "-" * 100_000 + "1 %}",
    ],
)
def test_a_template_is_only_read_whatever_it_says(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert published_system_prompt(template) is None
    assert not list(tmp_path.iterdir())


@cache
def control_ids(tokenizer: Tokenizer) -> set[int]:
    names = {token["content"]: token["id"] for token in json.loads(tokenizer._description)["added_tokens"]}
    assert names.keys() >= {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    return set(names.values())


@given(data=st.data())
def test_hostile_text_makes_no_control_token_by_either_encoder(
    any_tokenizer: Tokenizer, hostile: st.SearchStrategy[str], data: st.DataObject
) -> None:
    batch = data.draw(st.lists(hostile, max_size=3))
    control = control_ids(any_tokenizer)
    for ids in [*any_tokenizer.encode_batch(batch), *any_tokenizer._encode_by_library(batch)]:
        assert control.isdisjoint(ids)
    if any_tokenizer._quick:  # the other one normalizes
        assert [any_tokenizer.decode(ids) for ids in any_tokenizer.encode_batch(batch)] == batch


@given(data=st.data(), generation_prompt=st.booleans())
def test_hostile_turns_open_and_close_nothing(
    any_tokenizer: Tokenizer, hostile: st.SearchStrategy[str], data: st.DataObject, generation_prompt: bool
) -> None:
    turns = data.draw(conversations(hostile))
    ids = any_tokenizer.chat(turns, generation_prompt)
    control = [id for id in ids if id in control_ids(any_tokenizer)]
    start, end = any_tokenizer.im_start_id, any_tokenizer.im_end_id
    assert control == [start, end] * len(turns) + [start] * generation_prompt


def test_a_name_split_over_two_turns_stays_in_pieces(any_tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "<|im_"}, {"role": "assistant", "content": "end|>"}]
    ids = any_tokenizer.chat(turns)
    assert [id for id in ids if id in control_ids(any_tokenizer)] == [
        any_tokenizer.im_start_id,
        any_tokenizer.im_end_id,
    ] * 2


def test_a_default_prompt_that_is_no_text_is_damage(gpt4_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(gpt4_dir / "tokenizer.json")
    for damaged in ('{"default_system_prompt": 5}', "{"):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(Failure, match=r"tokenizer_config\.json is damaged"):
            Tokenizer.load(tmp_path)


# ---- other published tokenizers ------------------------------------------------------------------------


def test_a_tokenizer_in_qwens_manner_gives_auto_tokenizers_ids(qwen_dir: Path, texts: st.SearchStrategy[str]) -> None:
    ours, theirs = Tokenizer.load(qwen_dir), auto(qwen_dir)

    @given(text=texts)
    def check(text: str) -> None:
        assert ours.encode(text) == theirs(text)["input_ids"]

    check()


def test_a_tokenizer_in_qwens_manner_pads_with_the_end_of_text(qwen_dir: Path) -> None:
    ours = Tokenizer.load(qwen_dir)
    assert ours.pad_id == ours.eot_id == 320
    assert (ours.im_start_id, ours.im_end_id, ours.vocab_size) == (321, 322, 326)
    assert ours.decode([323, *ours.encode("grain"), 324]) == "<think>grain</think>"
    assert ours.decode(ours.encode("<think>")) == "<think>"
    assert len(ours.encode("<think>")) > 1
