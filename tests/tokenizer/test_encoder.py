"""Claims about the quick encoder: it is chosen only where `tokenizers` would give the same ids, and then it does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from gristmill.errors import InputError
from gristmill.tokenizer import Tokenizer, encoder
from gristmill.tokenizer.layout import byte_of_symbol


@pytest.fixture(scope="module")
def with_merges(tokenizer_dir: Path) -> Callable[..., Tokenizer]:
    """The small tokenizer with other merges: pairs of strings; what they make is numbered in order."""
    file = json.loads((tokenizer_dir / "tokenizer.json").read_text())

    def make(pairs: list[tuple[str, str]], **model: Any) -> Tokenizer:
        vocab = {symbol: id for id, symbol in enumerate(byte_of_symbol())}
        for left, right in pairs:
            vocab.setdefault(left + right, len(vocab))
        special = [token | {"id": len(vocab) + i} for i, token in enumerate(file["added_tokens"])]
        changed = {"model": file["model"] | {"vocab": vocab, "merges": pairs} | model, "added_tokens": special}
        return Tokenizer(json.dumps(file | changed))

    return make


@given(data=st.data())
def test_whenever_it_is_chosen_it_merges_as_the_library_does(
    with_merges: Callable[..., Tokenizer], data: st.DataObject
) -> None:
    known, pairs = ["a", "b", "c"], []
    for _ in range(data.draw(st.integers(0, 9))):  # merges as training could never learn them
        left, right = data.draw(st.sampled_from(known)), data.draw(st.sampled_from(known))
        if (left, right) not in pairs:
            pairs.append((left, right))
            known.append(left + right)
    tokenizer = with_merges(pairs)
    event("quick" if tokenizer._quick else "library")
    for text in data.draw(st.lists(st.text("abc", min_size=1, max_size=40), min_size=1, max_size=20)):
        assert tokenizer.encode(text) == tokenizer._encode_by_library([text])[0]


def test_it_is_refused_where_lowest_id_first_would_merge_otherwise(with_merges: Callable[..., Tokenizer]) -> None:
    assert with_merges([("a", "b"), ("ab", "c")])._quick
    # alone, "abc" becomes "a" "bc" and stays so: tiktoken would merge the two
    stuck = with_merges([("b", "c"), ("a", "b"), ("ab", "c")])
    assert stuck._quick is None
    assert stuck.decode(stuck.encode("abc abab")) == "abc abab"
    assert with_merges([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")])._quick is None  # one token, two merges


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_it_is_refused_for_another_way_to_pieces(tokenizer_dir: Path, change: dict[str, Any]) -> None:
    file = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    assert Tokenizer(json.dumps(file))._quick
    other = Tokenizer(json.dumps(file | change))
    assert other._quick is None
    assert other.decode(other.encode("grain 12345\n")) == "grain 12345\n"


def test_it_is_chosen_for_the_other_spelling_of_the_same_split(tokenizer_dir: Path) -> None:
    description = (tokenizer_dir / "tokenizer.json").read_text()
    file = json.loads(description)
    file["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]  # as files before 2024 have them
    older = Tokenizer(json.dumps(file))
    assert older._quick
    text = "  def mill(grain):\n\t\treturn 12345\u3000 \n "
    assert older.encode(text) == older._encode_by_library([text])[0] == Tokenizer(description).encode(text)


@given(data=st.data())
def test_on_any_text_it_equals_the_library(
    tokenizer: Tokenizer, texts: st.SearchStrategy[str], data: st.DataObject
) -> None:
    assert tokenizer._quick
    text = data.draw(texts)
    assert tokenizer.encode(text) == tokenizer._encode_by_library([text])[0]


def test_groups_on_threads_keep_the_order(gpt4: Tokenizer, qwen_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [f"document {i} " * (i % 7) for i in range(300)]
    one_by_one = [gpt4.encode(text) for text in batch]
    monkeypatch.setattr(encoder, "GROUP_CHARS", 500)
    for threads in (1, 2, 5):
        assert encoder.over_threads(gpt4._encode, batch, threads) == one_by_one
    assert gpt4.encode_batch(tuple(batch)) == one_by_one
    assert gpt4.encode_batch([]) == Tokenizer.load(qwen_dir).encode_batch([]) == []
    with pytest.raises(InputError, match="surrogate"):
        gpt4.encode_batch([*batch, "\ud83c"])


@given(before=st.integers(0, 12), blanks=st.integers(0, 40), kind=st.sampled_from(" \n\t\u3000\u00e9"))
def test_a_long_blank_is_seen_and_a_short_one_is_not(before: int, blanks: int, kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "LONG_BLANK", 10)
        found = encoder.has_long_blank("x" * before + kind * blanks + "x")
    if blanks >= 19:
        assert found == (kind != "\u00e9")
    if blanks < 10:
        assert not found


def test_texts_around_a_long_blank_have_the_same_ids_either_way(
    gpt4: Tokenizer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ["a" + blank * 30 + end for blank in (" ", "\n", " \n", "\t") for end in ("", "b", "!", "7", "\n x")]
    for one in (gpt4, tokenizer):
        usual = one.encode_batch(batch)
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "LONG_BLANK", 5)
            assert all(encoder.has_long_blank(text) for text in batch)
            assert one.encode_batch(batch) == usual
