"""Makes the tokenizer of a corpus: byte-level BPE trained on a sample of the training documents, or GPT-4's.

Reads the corpus's Parquet files, writes a Hugging Face tokenizer directory. The same corpus and configuration give
the same bytes, whatever the number of threads.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gristmill import progress
from gristmill.artifact import Built
from gristmill.current import TOKENIZER
from gristmill.errors import InputError
from gristmill.stage import OPERATIONAL, START, Checked, Context, Stage, StageRun
from gristmill.tokenizer.gpt4 import load_table, write_gpt4
from gristmill.tokenizer.layout import GPT4_VOCAB_SIZE, SPECIAL_TOKENS, SPLIT_PATTERN, write_tokenizer
from gristmill.tokenizer.start import add_start_token, upgrade
from gristmill.tokenizer.tokenizer import Tokenizer

DEFAULT_VOCAB_SIZE = 4096
SMALLEST = 256 + len(SPECIAL_TOKENS)  # every byte, no merge
LARGEST = 2**21  # three ids fit in 64 bits, which the evaluation's trigram needs
MEASURED_BYTES = 1 << 20  # of held-back text: enough for three digits of bytes per token
READ_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """`bpe` learns its merges from the corpus; `gpt4` is the table of GPT-4 (cl100k_base) with DBRX's special ids;
    `start` is the one of the model that training goes on from.

    `vocab_size` counts the 256 bytes and the 8 special tokens. A small corpus may yield fewer tokens. None means:
    4,096 for `bpe`. `gpt4` has 100,280 ids.
    `sample_bytes` caps the text that merges are learned from; beyond some thousand bytes per token more changes little.
    `table` is the path of a cl100k_base.tiktoken; see `gpt4.load_table` for where it is looked for without.
    """

    kind: Literal["bpe", "gpt4", "start"] = "bpe"
    vocab_size: int | None = None
    sample_bytes: int = 16 << 20
    table: str | None = field(default=None, metadata=OPERATIONAL)  # there is one table: its hash is checked

    def __post_init__(self) -> None:
        if self.kind != "bpe" and self.vocab_size not in (None, self.num_ids):
            raise ValueError(f"vocab_size={self.vocab_size} is for kind=bpe; with kind={self.kind} set it to null")
        if self.kind != "gpt4" and self.table is not None:
            raise ValueError(f"table={self.table!r} is read with kind=gpt4 only; leave it out or change kind")
        if self.vocab_size is not None and not SMALLEST <= self.vocab_size <= LARGEST:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least {SMALLEST} (every byte and the special tokens) and at "
                f"most {LARGEST}"
            )
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes={self.sample_bytes} must be at least 1")

    @property
    def num_ids(self) -> int | None:
        """Ids that a model needs rows for; None where the model says it."""
        match self.kind:
            case "bpe":
                return DEFAULT_VOCAB_SIZE if self.vocab_size is None else self.vocab_size
            case "gpt4":
                return GPT4_VOCAB_SIZE
            case "start":
                return None


def build_tokenizer(cfg: TokenizerConfig, corpus: Path, out: Path, start: Path | None = None) -> Built:
    """Write the tokenizer to the empty directory `out`; merges are learned from `corpus`'s training split.

    start: the tokenizer directory of the model that training goes on from.

    Metrics: `vocab_size`, `sample_bytes` (learned from), and `bytes_per_token` of validation text, of all and by
    source (of training text when the corpus has no validation split).
    """
    train = corpus / "documents-train.parquet"
    chosen: dict[int, int] = {}
    match cfg.kind:
        case "bpe":
            chosen = choose(train, cfg.sample_bytes)
            if not chosen:
                raise InputError(f"{train} has no documents to learn a tokenizer from; give the corpus some text")
            write_tokenizer(out, learn(cfg.num_ids or DEFAULT_VOCAB_SIZE, train, chosen).to_str(pretty=True))
            add_start_token(out)
        case "gpt4":
            write_gpt4(out, cfg.table)
            add_start_token(out)
        case "start":
            if start is None or not start.is_dir():
                raise InputError("the model to go on from has no tokenizer; put the one there that it was trained with")
            shutil.copytree(start, out, dirs_exist_ok=True)
            upgrade(start, out)
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


# ---- the stage -----------------------------------------------------------------------------------------


def _check(cfg: TokenizerConfig, context: Context) -> Checked:
    if cfg.kind == "gpt4":
        load_table(cfg.table)  # raises InputError if it cannot be read
    return Checked()


def _build(run: StageRun[TokenizerConfig], out: Path) -> Built:
    start = run.inputs[START].path / TOKENIZER if START in run.inputs else None
    return build_tokenizer(run.config, run.inputs["corpus"].path, out, start)


def _summary(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['vocab_size']:,} tokens, {metrics['bytes_per_token']:.2f} bytes each"


TOKENIZER_STAGE = Stage(
    name="tokenizer",
    format=1,
    config=TokenizerConfig,
    inputs=("corpus", START),
    check=_check,
    build=_build,
    doing="making the vocabulary",
    summary=_summary,
)
