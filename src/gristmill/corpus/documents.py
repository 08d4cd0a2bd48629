"""What a source gives and what the steps pass on: documents as Arrow record batches, and counted drops.

Nothing disappears: whatever a source finds becomes either a row of a batch or a `Dropped` with a reason.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

RAW = pa.schema(
    [
        ("id", pa.string()),
        ("data", pa.large_binary()),  # as found; the decode step makes text of it
        ("source", pa.string()),
        ("group", pa.string()),
        ("license", pa.string()),
    ]
)
DOCUMENTS = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("group", pa.string()),
        ("license", pa.string()),
        ("num_bytes", pa.int64()),  # of the text in UTF-8
        ("num_lines", pa.int32()),
        ("mean_line_bytes", pa.float32()),
        ("alpha_share", pa.float32()),  # letters, and all bytes of other scripts, of the bytes that are not blank
    ]
)

BATCH_BYTES = 8 << 20  # large enough for numpy to pay, small enough that a handful fit anywhere
BATCH_ROWS = 4096
EXCERPT_CHARS = 200
NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Document:
    """One raw document. `data` are its bytes as found."""

    id: str
    data: bytes
    group: str
    license: str


@dataclass(frozen=True)
class Dropped:
    """A document that is not kept, and why. `num_bytes`: its size as found, 0 when it could not be read.

    `num_documents`: above 1 where a table lost a known number of rows together.
    """

    reason: str
    id: str
    source: str
    num_bytes: int
    excerpt: str
    duplicate_of: str | None = None
    num_documents: int = 1


def excerpt_of(data: bytes | str) -> str:
    """The first characters of a document, readable in JSON."""
    if isinstance(data, bytes):
        data = data[: 4 * EXCERPT_CHARS].decode("utf-8", "replace")
    # Half a surrogate pair, which JSON can carry, is not UTF-8.
    return data[:EXCERPT_CHARS].encode("utf-8", "replace").decode()


@dataclass
class Drops:
    """The drops so far, by reason; the first few of each are kept as examples."""

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, dropped: Dropped) -> None:
        entry = self.reasons.setdefault(dropped.reason, {"count": 0, "bytes": 0, "examples": []})
        entry["count"] += dropped.num_documents
        entry["bytes"] += dropped.num_bytes
        if len(entry["examples"]) < NUM_EXAMPLES:
            example = {"id": dropped.id, "source": dropped.source, "excerpt": dropped.excerpt}
            if dropped.duplicate_of is not None:
                example["duplicate_of"] = dropped.duplicate_of
            entry["examples"].append(example)

    def counts(self) -> dict[str, int]:
        return {reason: self.reasons[reason]["count"] for reason in sorted(self.reasons)}

    def summary(self) -> str:
        """The counts in one line, each with an example, and why the first file was unreadable."""
        parts = []
        for reason, entry in sorted(self.reasons.items()):
            example = entry["examples"][0]
            why = f" ({example['excerpt']})" if reason == "unreadable" else ""
            parts.append(f"{reason}: {entry['count']}, e.g. {example['id']}{why}")
        return "; ".join(parts)

    def to_json(self) -> str:
        return json.dumps(self.reasons, sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def batches(items: Iterable[Document | Dropped], source: str, drops: Drops) -> Iterator[pa.RecordBatch]:
    """Documents -> record batches of schema RAW; what a source dropped by itself goes to `drops`."""
    rows: list[Document] = []
    num_bytes = 0
    for item in items:
        if isinstance(item, Dropped):
            drops.add(item)
            continue
        rows.append(item)
        num_bytes += len(item.data)
        if num_bytes >= BATCH_BYTES or len(rows) >= BATCH_ROWS:
            yield _batch(rows, source)
            rows, num_bytes = [], 0
    if rows:
        yield _batch(rows, source)


def _batch(rows: list[Document], source: str) -> pa.RecordBatch:
    columns = [
        [row.id for row in rows],
        [row.data for row in rows],
        [source] * len(rows),
        [row.group for row in rows],
        [row.license for row in rows],
    ]
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, RAW, strict=True)], schema=RAW
    )
