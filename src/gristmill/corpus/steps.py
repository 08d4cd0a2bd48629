"""The cleaning steps: pure functions from a record batch to a record batch and the drops, each with a reason.

They see one batch at a time and share nothing, so any engine that maps functions over Arrow batches can run them
(Spark's `mapInArrow`, DuckDB through a reader). Shapes: D documents of a batch, N bytes of their texts.

Text is not brought to a Unicode normal form: composed and decomposed letters both occur in what a model will read,
code compares strings by code points, and bits per byte count the bytes that are there.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from gristmill.corpus.config import FilterConfig
from gristmill.corpus.documents import DOCUMENTS, Dropped, excerpt_of

Step = tuple[pa.RecordBatch, list[Dropped]]

BOM = b"\xef\xbb\xbf"
LONG_WORD_BYTES = 80

# What each byte of UTF-8 is. Bytes from 0x80 on belong to letters of other scripts, or nearly always.
LETTER, DIGIT, BLANK, OTHER = range(4)
KIND = np.full(256, OTHER, np.uint8)
KIND[[*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1), *range(0x80, 0x100)]] = LETTER
KIND[[*range(ord("0"), ord("9") + 1)]] = DIGIT
KIND[[*b" \t\n\r\f\v"]] = BLANK
# Words of scripts that use no blanks are not "long": any byte from 0x80 on ends one.
ENDS_WORD = (KIND == BLANK) | (np.arange(256) >= 0x80)
CONTROL = bytes(set(range(0x20)) - set(b"\t\n\r\f\v\b\x1b") | {0x7F})


# ---- decode --------------------------------------------------------------------------------------------


def decode(batch: pa.RecordBatch, cfg: FilterConfig) -> Step:
    """RAW -> DOCUMENTS with its signals: bytes to text, one kind of line end, no byte order mark.

    Drops: binary (a NUL byte, or more than one control character in a hundred), not_utf8, too_short, too_long.
    """
    texts: list[bytes] = []
    keep: list[int] = []
    dropped: list[Dropped] = []
    for row, (id, data, source) in enumerate(
        zip(*(batch.column(name).to_pylist() for name in ("id", "data", "source")), strict=True)
    ):
        text = data.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        reason = _unreadable(text, cfg)
        if reason is None:
            keep.append(row)
            texts.append(text)
        else:
            dropped.append(Dropped(reason, id, source, len(data), excerpt_of(data)))
    text = pa.array(texts, pa.binary()).cast(pa.string())
    kept = batch.take(pa.array(keep, pa.int64()))
    columns = {name: kept.column(name) for name in ("id", "source", "group", "license")} | {"text": text}
    signals = measure(text)
    columns |= {
        name: pa.array(getattr(signals, name)) for name in ("num_bytes", "num_lines", "mean_line_bytes", "alpha_share")
    }
    arrays = [columns[field.name].cast(field.type) for field in DOCUMENTS]
    return pa.RecordBatch.from_arrays(arrays, schema=DOCUMENTS), dropped


def max_raw_bytes(cfg: FilterConfig) -> int:
    """The longest form in which `decode` accepts a text: a byte order mark, and two bytes for each line end."""
    return len(BOM) + 2 * cfg.max_bytes


def _unreadable(text: bytes, cfg: FilterConfig) -> str | None:
    if len(text) > cfg.max_bytes:
        return "too_long"
    if b"\0" in text or (len(text) - len(text.translate(None, CONTROL))) * 100 > len(text):
        return "binary"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "not_utf8"
    if len(text.strip()) < cfg.min_bytes:
        return "too_short"
    return None


# ---- measure -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signals:
    """Per document, shape [D]. Shares of letters and digits are of the bytes that are not blank."""

    num_bytes: np.ndarray
    num_lines: np.ndarray
    mean_line_bytes: np.ndarray
    max_line_bytes: np.ndarray
    alpha_share: np.ndarray
    digit_share: np.ndarray
    long_word_share: np.ndarray  # bytes in words above LONG_WORD_BYTES, of all bytes


def measure(text: pa.StringArray) -> Signals:
    """Figures of each text, computed over the whole batch at once. Texts must not be empty."""
    D = len(text)
    offsets = np.frombuffer(text.buffers()[1], np.int32, D + 1, 4 * text.offset) if D else np.zeros(1, np.int32)
    data_N = np.frombuffer(text.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    starts = (offsets - offsets[0]).astype(np.int64)
    num_bytes = np.diff(starts)
    kinds_N = KIND[data_N]

    def count(mask_N: np.ndarray) -> np.ndarray:
        return np.add.reduceat(mask_N, starts[:-1], dtype=np.int64) if D else np.zeros(0, np.int64)

    solid = np.maximum(num_bytes - count(kinds_N == BLANK), 1)
    lines, line_owner = _pieces(np.flatnonzero(data_N == ord("\n")) + 1, starts)
    words, word_owner = _pieces(np.flatnonzero(ENDS_WORD[data_N]) + 1, starts)
    num_lines = np.bincount(line_owner, minlength=D)
    max_line = np.zeros(D, np.int64)
    np.maximum.at(max_line, line_owner, lines)
    long_bytes = np.bincount(word_owner, np.where(words > LONG_WORD_BYTES, words, 0), minlength=D)
    return Signals(
        num_bytes=num_bytes,
        num_lines=num_lines,
        mean_line_bytes=num_bytes / np.maximum(num_lines, 1),
        max_line_bytes=max_line,
        alpha_share=count(kinds_N == LETTER) / solid,
        digit_share=count(kinds_N == DIGIT) / solid,
        long_word_share=long_bytes / np.maximum(num_bytes, 1),
    )


def _pieces(ends: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the texts at `ends` (a piece includes the byte that ends it): lengths, and whose piece each is."""
    is_edge = np.zeros(int(starts[-1]) + 1, bool)  # marking is many times faster than sorting the two together
    is_edge[ends] = is_edge[starts] = True
    edges = np.flatnonzero(is_edge)
    return np.diff(edges), np.searchsorted(starts, edges[:-1], side="right") - 1


def repeated_share(text: str) -> float:
    """Share of a text's characters that stand in lines seen before in it, blanks at the ends aside."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


# ---- judge ---------------------------------------------------------------------------------------------


def judge(batch: pa.RecordBatch, cfg: FilterConfig) -> Step:
    """DOCUMENTS -> DOCUMENTS: keeps out what is not text or source that somebody wrote, by rules on its shape.

    long_line, long_lines   lines far beyond a paragraph: dumps and data on one line
    few_letters             tables of symbols, drawings, escaped bytes
    many_digits             tables of numbers, hexadecimal dumps
    long_words              base64, minified code, encoded descriptors: runs without a blank
    repeated_lines          logs, machine-written tables
    """
    found = measure(batch.column("text"))
    rules = (
        ("long_line", found.max_line_bytes > cfg.max_line_bytes),
        ("long_lines", found.mean_line_bytes > cfg.max_mean_line_bytes),
        ("few_letters", found.alpha_share < cfg.min_letter_share),
        ("many_digits", found.digit_share > cfg.max_digit_share),
        ("long_words", found.long_word_share > cfg.max_long_word_share),
    )
    texts = batch.column("text").to_pylist()
    reasons: list[str | None] = []
    for row, text in enumerate(texts):
        reason = next((name for name, fails in rules if fails[row]), None)
        if reason is None and repeated_share(text) > cfg.max_repeated_share:
            reason = "repeated_lines"
        reasons.append(reason)
    return part(batch, reasons)


# ---- exact duplicates ----------------------------------------------------------------------------------


@dataclass
class ExactDuplicates:
    """Drops a document whose words have been seen in the same order before: the first one stays.

    The one step with a memory: 16 bytes of hash and the id of each document that stayed.
    """

    seen: dict[bytes, str] = field(default_factory=dict)

    def __call__(self, batch: pa.RecordBatch) -> Step:
        reasons: list[str | None] = []
        firsts: list[str | None] = []
        for id, text in zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True):
            key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
            first = self.seen.get(key)
            self.seen.setdefault(key, id)
            reasons.append(None if first is None else "duplicate")
            firsts.append(first)
        return part(batch, reasons, firsts)


def part(batch: pa.RecordBatch, reasons: list[str | None], duplicate_of: list[str | None] | None = None) -> Step:
    """The rows without a reason, and the others as drops."""
    dropped = []
    for row, reason in enumerate(reasons):
        if reason is not None:
            id, text, source, num_bytes = (
                batch.column(name)[row].as_py() for name in ("id", "text", "source", "num_bytes")
            )
            first = duplicate_of[row] if duplicate_of else None
            dropped.append(Dropped(reason, id, source, num_bytes, excerpt_of(text), first))
    keep = [row for row, reason in enumerate(reasons) if reason is None]
    return batch.take(pa.array(keep, pa.int64())), dropped
