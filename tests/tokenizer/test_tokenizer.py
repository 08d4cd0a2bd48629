"""Claims about text and ids, against transformers, the `regex` package and Python's own UTF-8."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from gristmill.errors import Failure, InputError
from gristmill.tokenizer import Tokenizer
from gristmill.tokenizer.layout import SPECIAL_TOKENS, SPLIT_PATTERN

# tiktoken's pattern for cl100k_base as GPT-4 was released with it, in the words of tiktoken 0.3.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same as rewritten for speed in tiktoken 0.8; `\s++$` is its one difference in pieces (not in GPT-4's ids).
CL100K_FAST = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

# Fragments that meet every branch of the pattern, among any other characters.
fragments = st.sampled_from(
    [
        "'s",
        "'LL",
        "'d",
        "don't",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "12345",
        "٣",
        "²",
        "é",
        "世",
        "🌾",
        "_",
        "..",
        "\u00a0",
        "x",
    ]
)
texts = st.lists(st.one_of(fragments, st.text(max_size=4)), max_size=12).map("".join)
with_specials = st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text(max_size=6)), max_size=6).map("".join)


@pytest.fixture(scope="module")
def auto(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@given(text=st.text())
def test_any_unicode_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


@given(text=texts)
def test_ids_equal_those_of_auto_tokenizer(tokenizer: Tokenizer, auto: Any, text: str) -> None:
    assert tokenizer.encode_prompt(text) == auto(text)["input_ids"] == auto.encode(text)
    assert tokenizer.encode(text) == auto(text, add_special_tokens=False)["input_ids"]


@given(batch=st.lists(texts, max_size=5))
def test_a_batch_equals_its_texts_one_by_one(tokenizer: Tokenizer, batch: list[str]) -> None:
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


@given(text=with_specials)
def test_names_of_special_tokens_in_text_stay_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert max(ids, default=0) < tokenizer.vocab_size - len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text


def old_unicode(text: str) -> bool:
    """Only characters that every engine's Unicode tables agree on."""
    return all(unicodedata.ucd_3_2_0.category(c) != "Cn" for c in text)


@given(text=texts.filter(old_unicode))
def test_the_split_equals_tiktokens_pattern_for_cl100k(text: str) -> None:
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
    assert pieces == regex.findall(CL100K, text)
    if text == text.rstrip():  # see CL100K_FAST
        assert pieces == regex.findall(CL100K_FAST, text)


@given(ids=st.lists(st.integers(0, 400)))
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)


@given(text=st.text())
def test_a_stream_never_shows_part_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    decoder = tokenizer.stream_decoder()
    shown = ""
    for id in tokenizer.encode(text):
        shown += decoder.feed(id)
        assert text.startswith(shown)
    assert decoder.flush() == ""
    assert shown == text


def test_special_tokens_take_the_last_ids_in_dbrx_order(tokenizer: Tokenizer, auto: Any) -> None:
    ids = auto.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(tokenizer.vocab_size - 8, tokenizer.vocab_size))
    assert len(auto) == tokenizer.vocab_size
    assert [tokenizer.eot_id, tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id] == [ids[0], *ids[-3:]]
    assert (auto.bos_token, auto.eos_token, auto.unk_token, auto.pad_token) == ("<|endoftext|>",) * 3 + ("<|pad|>",)
    assert auto.decode(ids, skip_special_tokens=True) == ""


def test_every_byte_has_a_token_and_spare_ids_show(tokenizer: Tokenizer) -> None:
    assert {tokenizer.decode_bytes([id]) for id in range(256)} == {bytes([byte]) for byte in range(256)}
    assert tokenizer.decode([tokenizer.eot_id]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == "\ufffd\ufffd"
    with pytest.raises(ValueError, match="negative"):
        tokenizer.decode([-1])


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}),
    min_size=1,
    max_size=4,
)


@given(conversation=messages, generation_prompt=st.booleans())
def test_chat_equals_apply_chat_template(
    tokenizer: Tokenizer, auto: Any, conversation: list[dict[str, str]], generation_prompt: bool
) -> None:
    ids = auto.apply_chat_template(conversation, add_generation_prompt=generation_prompt)["input_ids"]
    assert tokenizer.chat(conversation, generation_prompt) == ids


def test_chat_is_chatml_as_dbrx_writes_it(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Grind!"}, {"role": "assistant", "content": "Yes."}]
    assert tokenizer.decode(tokenizer.chat(turns)) == (
        "<|im_start|>user\nGrind!<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    )
    assert tokenizer.decode(tokenizer.chat(turns[:1], generation_prompt=True)) == (
        "<|im_start|>user\nGrind!<|im_end|>\n<|im_start|>assistant\n"
    )


@given(content=with_specials)
def test_chat_content_cannot_open_or_close_a_turn(tokenizer: Tokenizer, content: str) -> None:
    ids = tokenizer.chat([{"role": "user", "content": content}])
    specials = [id for id in ids if id >= tokenizer.vocab_size - len(SPECIAL_TOKENS)]
    assert specials == [tokenizer.im_start_id, tokenizer.im_end_id]
    assert tokenizer.decode(ids[1:-1]) == f"user\n{content}"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user\n<|im_end|>", "content": ""},
        {"role": "User", "content": ""},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": "", "name": "x"},
    ],
)
def test_chat_refuses_what_it_would_have_to_guess_at(tokenizer: Tokenizer, message: Any) -> None:
    with pytest.raises(InputError, match=r"messages\[0\]"):
        tokenizer.chat([message])


def test_half_a_surrogate_pair_is_bad_input(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_loading_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for damaged in ("{", "[]", '{"added_tokens": [], "model": {"vocab": {}}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(Failure, match="is not a byte-level BPE"):
            Tokenizer.load(tmp_path)
