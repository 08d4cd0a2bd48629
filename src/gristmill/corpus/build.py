"""The corpus stage: reads the sources, cleans, removes duplicates, splits, and writes the documents.

The order of the work, and why:
  decode, judge    cheap and per document, so that nothing later sees what is not text
  exact duplicates as documents come, in the order of (source, its own reading order): the first one stays
  near duplicates  over all sources at once, on 512-byte signatures; the texts wait in a spool file on disk
  split            last, on what is kept, so that the shares are of real bytes
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gristmill import progress
from gristmill.artifact import Built
from gristmill.corpus import dedup, licenses, steps
from gristmill.corpus.config import CorpusConfig, SourceConfig
from gristmill.corpus.documents import DOCUMENTS, Dropped, Drops, batches, excerpt_of
from gristmill.corpus.files import DatasetSource, PathSource
from gristmill.corpus.packages import STDLIB, PackagesSource
from gristmill.corpus.split import SPLITS, assign_splits
from gristmill.errors import InputError
from gristmill.stage import Checked, Context, Stage

Source = PackagesSource | PathSource | DatasetSource

SPOOL = ".spool.arrow"
ROW_GROUP_BYTES = 16 << 20
INDEX = pa.schema([field for field in DOCUMENTS if field.name != "text"])


def fingerprint(cfg: CorpusConfig) -> dict[str, str]:
    """Source name -> identity of its input: part of the stage's key, so that new input means a new corpus.

    Raises InputError for a source that cannot be found or that has no usable license.
    """
    return {name: open_source(name, cfg).fingerprint() for name in sorted(cfg.sources)}


def build_corpus(cfg: CorpusConfig, out: Path) -> Built:
    """Write `documents-{train,validation,test}.parquet` and `drops.json` below the existing directory `out`.

    Raises InputError for a source that cannot be used, and when no document of a source is left.
    """
    sources = [open_source(name, cfg) for name in sorted(cfg.sources)]
    drops = Drops()
    spool = out / SPOOL
    try:
        signatures = _read(sources, cfg, drops, spool)
        with pa.memory_map(str(spool)) as mapped, pa.ipc.open_file(mapped) as reader:
            built = _write(reader, signatures, sources, cfg, drops, out)
    finally:
        spool.unlink(missing_ok=True)
    return built


def open_source(name: str, cfg: CorpusConfig) -> Source:
    """The reader of one source. Raises InputError that begins with the path of the setting to change."""
    source = cfg.sources[name]
    if source.packages is not None:
        return PackagesSource(name, source, cfg.allow_licenses)
    _check_license(f"corpus.sources.{name}.license", source, cfg.allow_licenses)
    return PathSource(name, source, cfg) if source.path is not None else DatasetSource(name, source, cfg)


def _check_license(where: str, source: SourceConfig, allowed: tuple[str, ...]) -> None:
    if source.license_field is not None:
        return
    if not source.license:
        raise InputError(
            f"{where}: is missing; name the license of these documents as an SPDX identifier, e.g. MIT or CC-BY-4.0, "
            "or LicenseRef-Own for your own text with LicenseRef-Own added to corpus.allow_licenses"
        )
    if not licenses.is_expression(source.license):
        raise InputError(f"{where}: {source.license!r} is not an SPDX expression such as MIT or 'Apache-2.0 OR MIT'")
    if not licenses.is_allowed(source.license, allowed):
        raise InputError(
            f"{where}: {source.license!r} is not covered by corpus.allow_licenses ({', '.join(allowed)}); "
            "add it there if you may train on these documents"
        )


# ---- reading -------------------------------------------------------------------------------------------


def _read(sources: list[Source], cfg: CorpusConfig, drops: Drops, spool: Path) -> np.ndarray:
    """Documents that pass the steps, into the spool file; gives their signatures [D, P] in the same order."""
    parts = [np.zeros((0, cfg.near_duplicates.num_permutations), np.uint32)]
    exact = steps.ExactDuplicates()
    with (
        pa.OSFile(str(spool), "wb") as sink,
        pa.ipc.new_file(sink, DOCUMENTS) as writer,
        progress.bar("reading and cleaning documents", sum(source.num_bytes() for source in sources)) as advance,
    ):
        for source in sources:
            for raw in batches(source.documents(advance), source.name, drops):
                decoded, undecoded = steps.decode(raw, cfg.filters)
                judged, refused = steps.judge(decoded, cfg.filters)
                batch, repeated = exact(judged)
                for item in (*undecoded, *refused, *repeated):
                    drops.add(item)
                if batch.num_rows:
                    writer.write_batch(batch)
                    parts.append(dedup.signatures(batch.column("text").to_pylist(), cfg.near_duplicates))
    return np.concatenate(parts)


# ---- writing -------------------------------------------------------------------------------------------


def _write(
    reader: pa.ipc.RecordBatchFileReader,
    signatures: np.ndarray,
    sources: list[Source],
    cfg: CorpusConfig,
    drops: Drops,
    out: Path,
) -> Built:
    every = _index(reader)
    kept = every.take(pa.array(_unlike(every, signatures, reader, cfg, drops)))
    _require_documents(kept, sources, drops)
    kept = kept.sort_by([("source", "ascending"), ("group", "ascending"), ("id", "ascending"), ("row", "ascending")])
    splits = assign_splits(_bytes_by_group(kept), cfg.split)
    metrics: dict[str, Any] = {}
    with progress.bar("writing documents", kept.num_rows) as advance:
        for split in SPLITS:
            mask = pa.array([splits[group] == split for group in kept["group"].to_pylist()], pa.bool_())
            part = kept.filter(mask)
            with pq.ParquetWriter(out / f"documents-{split}.parquet", DOCUMENTS, compression="zstd") as writer:
                for batch in _gather(reader, part["row"].to_numpy(), part["num_bytes"].to_numpy()):
                    writer.write_batch(batch)
                    advance(batch.num_rows)
            metrics[split] = _counts(part) | {"groups": len(part["group"].unique())}
    (out / "drops.json").write_text(drops.to_json(), "utf-8")
    return Built(
        metrics=_counts(kept) | {"dropped": drops.counts(), "splits": metrics},
        sources={source.name: _describe(source, kept) for source in sources},
    )


def _index(reader: pa.ipc.RecordBatchFileReader) -> pa.Table:
    """All columns but the text, and `row`: the document's place in the spool."""
    parts = [reader.get_batch(number).select(INDEX.names) for number in range(reader.num_record_batches)]
    table = pa.Table.from_batches(parts, INDEX)
    return table.append_column("row", pa.array(np.arange(table.num_rows)))


def _unlike(
    index: pa.Table, signatures: np.ndarray, reader: pa.ipc.RecordBatchFileReader, cfg: CorpusConfig, drops: Drops
) -> np.ndarray:
    """Rows that stay after near-deduplication, ascending; the others become drops."""
    rows = np.arange(index.num_rows)
    if cfg.near_duplicates.threshold == 1:
        return rows
    clusters = dedup.clusters(signatures, cfg.near_duplicates)
    stays = dedup.survivors(clusters, index["num_bytes"].to_numpy())
    gone = np.flatnonzero(stays != rows)
    ids, origins, sizes = (index[name].to_pylist() for name in ("id", "source", "num_bytes"))
    texts = (text for batch in _gather(reader, gone, index["num_bytes"].to_numpy()[gone]) for text in batch["text"])
    for row, text in zip(gone.tolist(), texts, strict=True):
        excerpt = excerpt_of(text.as_py())
        drops.add(Dropped("near_duplicate", ids[row], origins[row], sizes[row], excerpt, ids[stays[row]]))
    kept: np.ndarray = rows[stays == rows]
    return kept


def _gather(reader: pa.ipc.RecordBatchFileReader, rows: np.ndarray, num_bytes: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The spool's rows in the order given, in batches of about ROW_GROUP_BYTES."""
    starts = np.cumsum([0] + [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)])
    for piece in np.split(rows, _cuts(num_bytes)):
        if not len(piece):
            continue
        homes = np.searchsorted(starts, piece, side="right") - 1
        order = np.argsort(homes, kind="stable")
        parts = [
            reader.get_batch(int(home)).take(pa.array(piece[order][homes[order] == home] - starts[home]))
            for home in np.unique(homes)
        ]
        yield pa.concat_batches(parts).take(pa.array(np.argsort(order, kind="stable")))


def _cuts(num_bytes: np.ndarray) -> np.ndarray:
    """Where to cut a run of documents so that the pieces hold about ROW_GROUP_BYTES."""
    filled = np.cumsum(num_bytes) // ROW_GROUP_BYTES
    return np.flatnonzero(np.diff(filled)) + 1


# ---- figures -------------------------------------------------------------------------------------------


def _require_documents(kept: pa.Table, sources: list[Source], drops: Drops) -> None:
    present = set(kept["source"].to_pylist())
    for source in sources:
        if source.name in present:
            continue
        lines = [
            f"  {reason}: {entry['count']} ({entry['bytes']:,} bytes), e.g. {entry['examples'][0]['id']}"
            for reason, entry in sorted(drops.reasons.items())
        ]
        raise InputError(
            "\n".join(
                [f"corpus.sources.{source.name}: no document is left; what was dropped from all sources:", *lines]
            )
            + "\nchange the source, or the limits in corpus.filters"
        )


def _bytes_by_group(kept: pa.Table) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    summed = kept.group_by(["group", "source"]).aggregate([("num_bytes", "sum")])
    for row in summed.to_pylist():
        groups.setdefault(row["group"], {})[row["source"]] = row["num_bytes_sum"]
    return groups


def _counts(table: pa.Table) -> dict[str, int]:
    return {"documents": table.num_rows, "bytes": sum(table["num_bytes"].to_pylist())}


def _describe(source: Source, kept: pa.Table) -> dict[str, Any]:
    mine = kept.filter(pc.equal(kept["source"], source.name))
    by_license = mine.group_by("license").aggregate([("num_bytes", "sum")]).to_pylist()
    spdx: Mapping[str, int] = {
        row["license"]: row["num_bytes_sum"] for row in sorted(by_license, key=lambda r: r["license"])
    }
    detail: dict[str, Any] = dict(source.detail)
    if "packages" in detail:  # those of which nothing was kept are among the drops, not among the origins
        groups = set(mine["group"].to_pylist())
        detail["packages"] = {p: v for p, v in detail["packages"].items() if p == STDLIB or p in groups}
    return _counts(mine) | {"licenses": dict(spdx), "fingerprint": source.fingerprint()} | detail


# ---- the stage -----------------------------------------------------------------------------------------


def _check(cfg: CorpusConfig, context: Context) -> Checked:
    return Checked(fingerprint=fingerprint(cfg))


def _summary(metrics: Mapping[str, Any]) -> str:
    kept = f"{metrics['documents']:,} documents, {progress.data_size(metrics['bytes'])} kept"
    return f"{kept}; {sum(metrics['dropped'].values()):,} dropped with a reason each"


CORPUS_STAGE = Stage(
    name="corpus",
    format=2,
    config=CorpusConfig,
    inputs=(),
    check=_check,
    build=lambda run, out: build_corpus(run.config, out),
    doing="reading, cleaning and deduplicating documents",
    summary=_summary,
)
