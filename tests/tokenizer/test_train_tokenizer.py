"""Claims about training a tokenizer: what it samples, that it repeats, what it measures."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import InputError
from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from gristmill.tokenizer.layout import byte_of_symbol
from gristmill.tokenizer.train import choose, read

WriteCorpus = Callable[..., Path]

BUILD = """
import sys
from pathlib import Path
from gristmill.tokenizer import TokenizerConfig, build_tokenizer
build_tokenizer(TokenizerConfig(vocab_size=350), Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("threads", ["1", "3"])
def test_training_repeats_byte_for_byte_at_any_thread_count(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, threads: str
) -> None:
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    subprocess.run([sys.executable, "-c", BUILD, corpus, tmp_path], env=environment, check=True)
    names = sorted(file.name for file in tokenizer_dir.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (tokenizer_dir / name).read_bytes()


def test_merges_are_the_most_frequent_pairs_as_counted_by_hand(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [("1", "s", "xy xy xyz xyz xyz ab")])
    (out := tmp_path / "out").mkdir()
    build_tokenizer(TokenizerConfig(vocab_size=256 + 3 + 8), corpus, out)
    # pairs: "xy" 5; then " "+"xy" 4, "xy"+"z" 3; then, with " xy" one symbol, " xy"+"z" 3
    assert json.loads((out / "tokenizer.json").read_text())["model"]["merges"] == [
        ["x", "y"],
        ["Ġ", "xy"],
        ["Ġxy", "z"],
    ]


def test_a_tiny_corpus_gives_a_smaller_vocabulary_with_specials_last(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [("1", "s", "abc")])
    (out := tmp_path / "out").mkdir()
    built = build_tokenizer(TokenizerConfig(vocab_size=4096), corpus, out)
    assert built.metrics["vocab_size"] == 256 + 8
    assert Tokenizer.load(out).eot_id == 256
    assert built.metrics["bytes_per_token"] == 1


def test_the_metric_is_bytes_per_token_of_the_validation_split(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    built = build_tokenizer(TokenizerConfig(vocab_size=350), corpus, tmp_path)
    held_back = corpus / "documents-validation.parquet"
    texts = dict(read(held_back, choose(held_back, 1 << 20)))
    by_source = {source: len(text.encode()) / len(tokenizer.encode(text)) for source, text in texts.items()}
    assert built.metrics["bytes_per_token_by_source"] == pytest.approx(by_source)
    assert 1 < built.metrics["bytes_per_token"] < 10
    assert built.metrics["vocab_size"] == tokenizer.vocab_size == 350


@pytest.fixture(scope="module")
def documents(write_corpus: WriteCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(f"{i}", "abc"[i % 3], "é" * (i * 7 % 50)) for i in range(60)]
    return write_corpus(tmp_path_factory.mktemp("sample"), rows) / "documents-train.parquet"


@given(budget=st.integers(1, 4000))
def test_a_sample_keeps_the_budget_and_the_sources_shares(documents: Path, budget: int) -> None:
    everything = choose(documents, 1 << 30)
    total = sum(everything.values())
    chosen = choose(documents, budget)
    assert abs(sum(chosen.values()) - min(budget, total)) <= 3
    for residue in range(3):
        size, taken = (sum(n for row, n in part.items() if row % 3 == residue) for part in (everything, chosen))
        assert abs(taken - size * min(1, budget / total)) <= 1
    texts = [text for _, text in read(documents, chosen)]
    assert len(texts) == len(chosen)
    assert all(set(text) <= {"é"} for text in texts)


def test_a_larger_sample_contains_the_smaller_one(documents: Path) -> None:
    assert set(choose(documents, 500)) <= set(choose(documents, 1000)) <= set(choose(documents, 2000))


def test_the_byte_table_is_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_of_symbol()) == set(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("\0\t\n !az~\x7f", "é世🌾\u00ad\u0100"):
        symbols = "".join(piece for piece, _ in split.pre_tokenize_str(text))
        assert bytes(byte_of_symbol()[symbol] for symbol in symbols) == text.encode()


def test_impossible_settings_and_an_empty_corpus_say_so(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^vocab_size=263 must be at least 264"):
        TokenizerConfig(vocab_size=263)
    with pytest.raises(ValueError, match=r"^sample_bytes=0"):
        TokenizerConfig(sample_bytes=0)
    with pytest.raises(InputError, match="no documents"):
        build_tokenizer(TokenizerConfig(), write_corpus(tmp_path, []), tmp_path)
