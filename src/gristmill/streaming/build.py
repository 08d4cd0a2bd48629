"""Writes a corpus's training documents as token blocks in MDS shards, one directory per source.

A source's documents, each after an `<|endoftext|>`, in an order shuffled by hash, form one stream of ids. A sample is a
block of it: `tokens`, block_tokens + 1 ids (the last is the next block's first, so that every token has a target), and
`starts`, the ascending offsets below block_tokens at which a run of one document's tokens starts. The first of them
is always 0, whether a document starts there or one goes on from the block before: MDS has no empty arrays.
The last block is completed from the stream's beginning.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from gristmill import progress
from gristmill.artifact import Built
from gristmill.errors import InputError
from gristmill.stage import Checked, Context, Stage, StageRun
from gristmill.streaming.config import ShardsConfig
from gristmill.streaming.mds import MDSWriter
from gristmill.streaming.order import Ints
from gristmill.streaming.remote import build_remote, read_manifest

if TYPE_CHECKING:
    import pyarrow as pa

EncodeBatch = Callable[[list[str]], list[list[int]]]

ENCODE_ROWS = 256  # documents tokenized at a time: enough to keep all cores busy
SPOOL = "stream.partial"


def build_shards(
    cfg: ShardsConfig, corpus: Path, encode_batch: EncodeBatch, eot_id: int, vocab_size: int, out: Path
) -> Built:
    """Tokenize `corpus`'s training split into `out`/<source>/.

    encode_batch: texts -> ids, nothing added. eot_id: of `<|endoftext|>`. vocab_size: ids are below it; they are
    stored as uint16 where they fit.
    Metrics: per source `documents`, `tokens` (of the stream, with one `<|endoftext|>` per document), `blocks`, `bytes`
    (of text); `bytes_per_token` over all.
    """
    documents = corpus / "documents-train.parquet"
    dtype = np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")
    streams = tokenize(documents, encode_batch, eot_id, dtype, out)
    if not streams:
        raise InputError(f"{documents} has no documents to shard; give the corpus some text")
    metrics = {}
    for source, stream in progress.track(streams.items(), "writing shards"):
        blocks = write_blocks(cfg, stream, out / source)
        metrics[source] = {
            "documents": len(stream.lengths),
            "tokens": stream.num_tokens,
            "blocks": blocks,
            "bytes": stream.num_bytes,
        }
        stream.spool.unlink()
    num_bytes, num_tokens = (sum(m[unit] for m in metrics.values()) for unit in ("bytes", "tokens"))
    return Built(metrics={"sources": metrics, "bytes_per_token": num_bytes / num_tokens})


class Stream:
    """One source's tokens: spooled to disk in file order, read in shuffled order.

    Tokenizing in file order and gathering afterwards keeps texts out of memory; ids stay on disk.
    """

    def __init__(self, spool: Path, dtype: "np.dtype[Any]") -> None:
        self.spool = spool
        self.dtype = dtype
        self.lengths: list[int] = []
        self.num_bytes = 0
        self._keys: list[bytes] = []
        self._file: BinaryIO = spool.open("wb")

    def append(self, id: str, num_bytes: int, tokens: list[int]) -> None:
        self._file.write(np.array(tokens, self.dtype).tobytes())
        self.lengths.append(len(tokens))
        self.num_bytes += num_bytes
        self._keys.append(hashlib.sha256(id.encode()).digest()[:8])

    def close(self) -> None:
        """All documents are in: fix the shuffled order."""
        self._file.close()
        order = np.array(sorted(range(len(self._keys)), key=lambda row: (self._keys[row], row)))
        lengths = np.array(self.lengths, np.int64)
        self._places: Ints = (np.cumsum(lengths) - lengths)[order]  # in the spool
        self._ends: Ints = np.cumsum(lengths[order])
        self._starts: Ints = self._ends - lengths[order]  # in the stream
        self.num_tokens = int(self._ends[-1])
        self._tokens = np.memmap(self.spool, self.dtype, "r")

    def read(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """`count` ids from position `first` on; the stream repeats for ever."""
        out = np.empty(count, self.dtype)
        done = 0
        while done < count:
            at = (first + done) % self.num_tokens
            document = int(np.searchsorted(self._ends, at, side="right"))
            take = min(count - done, int(self._ends[document]) - at)
            place = int(self._places[document]) + at - int(self._starts[document])
            out[done : done + take] = self._tokens[place : place + take]
            done += take
        return out

    def starts_in(self, first: int, count: int) -> Ints:
        """Offsets in [0, count) at which documents start, in the stream repeated for ever."""
        repeats = range(first // self.num_tokens, (first + count - 1) // self.num_tokens + 1)
        found = []
        for base in (repeat * self.num_tokens - first for repeat in repeats):
            low, high = np.searchsorted(self._starts, (-base, count - base))
            found.append(self._starts[low:high] + base)
        return np.concatenate(found)


def tokenize(
    documents: Path, encode_batch: EncodeBatch, eot_id: int, dtype: "np.dtype[Any]", out: Path
) -> dict[str, Stream]:
    """Spool every document's ids, by source in order of name."""
    streams: dict[str, Stream] = {}
    for batch in read(documents):
        rows = {name: batch[name].to_pylist() for name in ("id", "text", "source", "num_bytes")}
        encoded = encode_batch(rows["text"])
        for id, source, num_bytes, ids in zip(rows["id"], rows["source"], rows["num_bytes"], encoded, strict=True):
            if source not in streams:
                if Path(source).name != source:
                    raise InputError(f"source {source!r} cannot be the name of a directory; rename it")
                (out / source).mkdir()
                streams[source] = Stream(out / source / SPOOL, dtype)
            streams[source].append(id, num_bytes, [eot_id, *ids])
    for stream in streams.values():
        stream.close()
    return dict(sorted(streams.items()))


def read(documents: Path) -> "Iterator[pa.RecordBatch]":
    import pyarrow.parquet as pq  # here, so that reading shards needs numpy alone

    with pq.ParquetFile(documents) as file, progress.bar("tokenizing", file.metadata.num_rows) as advance:
        for batch in file.iter_batches(ENCODE_ROWS, columns=["id", "text", "source", "num_bytes"]):
            yield batch
            advance(batch.num_rows)


def write_blocks(cfg: ShardsConfig, stream: Stream, out: Path) -> int:
    """Cut one stream into blocks; returns how many."""
    length = cfg.block_tokens
    columns = {"tokens": f"ndarray:{stream.dtype.name}:{length + 1}", "starts": "ndarray:uint32"}
    count = -(-stream.num_tokens // length)
    with MDSWriter(out, columns, size_limit=cfg.size_limit, compression=cfg.compression) as writer:
        for first in range(0, count * length, length):
            starts = np.union1d([0], stream.starts_in(first, length)).astype(np.uint32)
            writer.write({"tokens": stream.read(first, length + 1), "starts": starts})
    return count


# ---- the stage -----------------------------------------------------------------------------------------


class Encoder(Protocol):
    """What the shards need of a tokenizer."""

    @property
    def eot_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


def shards_stage(load_tokenizer: Callable[[Path], Encoder]) -> Stage[ShardsConfig]:
    """The stage that writes shards, or the index of remote ones. load_tokenizer: opens a tokenizer's artifact."""

    def build(run: StageRun[ShardsConfig], out: Path) -> Built:
        cfg, corpus, tokenizer = run.config, run.inputs["corpus"], run.inputs["tokenizer"]
        if cfg.remote:
            return build_remote(cfg, run.checked.value, corpus, tokenizer, out)
        encoder = load_tokenizer(tokenizer.path)
        return build_shards(cfg, corpus.path, encoder.encode_batch, encoder.eot_id, encoder.vocab_size, out)

    return Stage(
        name="shards",
        format=1,
        config=ShardsConfig,
        inputs=("corpus", "tokenizer"),
        check=_check,
        build=build,
        doing="tokenizing into blocks",
        summary=_summary,
    )


def _check(cfg: ShardsConfig, context: Context) -> Checked:
    """Read the manifest of remote shards: its content is part of the key, because the files are not here."""
    if not (remote := cfg.source()):
        return Checked()
    remote.directory  # noqa: B018  # raises InputError if the home directory is unknown
    manifest = read_manifest(remote.url)
    return Checked(fingerprint={"remote": manifest["content"]}, value=manifest)


def _summary(metrics: Mapping[str, Any]) -> str:
    return f"{sum(source['tokens'] for source in metrics['sources'].values()):,} training tokens"
