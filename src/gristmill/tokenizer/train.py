"""Trains the tokenizer of a corpus: byte-level BPE on a sample of the training documents.

Reads the corpus's Parquet files, writes a Hugging Face tokenizer directory. The same corpus and configuration give
the same bytes, whatever the number of threads.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gristmill import progress
from gristmill.artifact import Built
from gristmill.errors import InputError
from gristmill.tokenizer.layout import CHAT_TEMPLATE, EOT, PAD, SPECIAL_TOKENS, SPLIT_PATTERN
from gristmill.tokenizer.tokenizer import Tokenizer

SMALLEST = 256 + len(SPECIAL_TOKENS)  # every byte, no merge
MEASURED_BYTES = 1 << 20  # of held-back text: enough for three digits of bytes per token
READ_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """`vocab_size` counts the 256 bytes and the 8 special tokens. A small corpus may yield fewer tokens.

    `sample_bytes` caps the text that merges are learned from; beyond some thousand bytes per token more changes little.
    """

    vocab_size: int = 4096
    sample_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least {SMALLEST}: every byte and the special tokens"
            )
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes={self.sample_bytes} must be at least 1")


def build_tokenizer(cfg: TokenizerConfig, corpus: Path, out: Path) -> Built:
    """Learn merges from `corpus`'s training split and write the tokenizer to the empty directory `out`.

    Metrics: `vocab_size`, `sample_bytes` (used), and `bytes_per_token` of validation text, of all and by source
    (of training text when the corpus has no validation split).
    """
    train = corpus / "documents-train.parquet"
    chosen = choose(train, cfg.sample_bytes)
    if not chosen:
        raise InputError(f"{train} has no documents to learn a tokenizer from; give the corpus some text")
    bpe = learn(cfg.vocab_size, train, chosen)
    (out / "tokenizer.json").write_text(bpe.to_str(pretty=True), encoding="utf-8")
    config = json.dumps(hugging_face_config(), indent=2, sort_keys=True)
    (out / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(out)
    held_back = corpus / "documents-validation.parquet"
    if not choose(held_back, MEASURED_BYTES):
        held_back = train
    return Built(
        metrics={
            "vocab_size": tokenizer.vocab_size,
            "sample_bytes": sum(chosen.values()),
            **measure(tokenizer, held_back),
        }
    )


def choose(documents: Path, budget_bytes: int) -> dict[int, int]:
    """Rows to sample and how many bytes of each: {row: bytes}, about `budget_bytes` in all.

    Each source contributes in proportion to its bytes; inside a source documents come in the order of a hash of
    their ids, and the last one is cut short.
    """
    if not documents.exists():
        return {}
    table = pq.read_table(documents, columns=["id", "source", "num_bytes"])
    ids, sources, sizes = (table[name].to_pylist() for name in ("id", "source", "num_bytes"))
    order = sorted(range(len(ids)), key=lambda row: (hashlib.sha256(ids[row].encode()).digest(), row))
    total = sum(sizes)
    share = min(1.0, budget_bytes / total) if total else 0.0
    left: dict[str, int] = {}
    for source, size in zip(sources, sizes, strict=True):
        left[source] = left.get(source, 0) + size
    left = {source: round(size * share) for source, size in left.items()}
    chosen = {}
    for row in order:
        take = min(sizes[row], left[sources[row]])
        if take > 0:
            chosen[row] = take
            left[sources[row]] -= take
    return chosen


def read(documents: Path, chosen: dict[int, int]) -> Iterator[tuple[str, str]]:
    """(source, text) of the chosen rows in file order; a text may end in a cut character's place."""
    first = 0
    for batch in pq.ParquetFile(documents).iter_batches(READ_ROWS, columns=["source", "text"]):
        for row in range(first, first + batch.num_rows):
            if row in chosen:
                text = batch["text"][row - first].as_py().encode()[: chosen[row]].decode(errors="ignore")
                yield batch["source"][row - first].as_py(), text
        first += batch.num_rows


def learn(vocab_size: int, documents: Path, chosen: dict[int, int]) -> tokenizers.Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) by the `tokenizers` library."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,  # a pair seen once is that document's accident
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for _, text in read(documents, chosen))
    bpe.train_from_iterator(progress.track(texts, "learning the tokenizer", len(chosen)), trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return bpe


def hugging_face_config() -> dict[str, Any]:
    """What `AutoTokenizer` needs beside tokenizer.json. As in DBRX nothing is added before or after a text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def measure(tokenizer: Tokenizer, documents: Path) -> dict[str, Any]:
    """Bytes per token of a sample, of everything and of each source."""
    num_bytes: dict[str, int] = {}
    num_tokens: dict[str, int] = {}
    for source, text in read(documents, choose(documents, MEASURED_BYTES)):
        num_bytes[source] = num_bytes.get(source, 0) + len(text.encode())
        num_tokens[source] = num_tokens.get(source, 0) + len(tokenizer.encode(text))
    return {
        "bytes_per_token": sum(num_bytes.values()) / max(1, sum(num_tokens.values())),
        "bytes_per_token_by_source": {s: num_bytes[s] / max(1, num_tokens[s]) for s in sorted(num_bytes)},
    }
