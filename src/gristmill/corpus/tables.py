"""Reads the documents of one file: the rows of a JSONL or Parquet table, or one text.

The only reader of documents that a user brings. Whatever a file holds becomes a `Document` or a `Dropped`: a damaged
archive gives the rows before the damage, and a damaged row takes no other with it.
"""

import bz2
import gzip
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gristmill.corpus import licenses, steps
from gristmill.corpus.config import FilterConfig, SourceConfig
from gristmill.corpus.documents import Document, Dropped, Drops, batches, excerpt_of
from gristmill.corpus.paths import file_size, open_file
from gristmill.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def _open_zstd(file: BinaryIO) -> Any:
    # The format's largest common window, 2 GiB: published dumps are compressed with `--long=31`.
    return zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})


COMPRESSION: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd
}  # fmt: skip
TABLES = (".parquet", ".jsonl", *(f".jsonl{suffix}" for suffix in COMPRESSION))
# A call that raises one of these has lost what it had unpacked before the damage.
SWALLOWS_OUTPUT = (zlib.error, lzma.LZMAError, zstd.ZstdError)
DAMAGE = (*SWALLOWS_OUTPUT, OSError, EOFError, pa.ArrowException)

ROWS_AT_ONCE = 256
PIECE = 1 << 16  # bytes unpacked at a time
OTHER_COLUMNS_BYTES = 256 << 20  # of a JSON line, next to its text
BYTES_PER_ESCAPE = 6  # of a byte of text that JSON writes as \u0041
READ_BYTES = 1 << 20
EXCERPT_BYTES = 4096  # of a line that is too long
MAX_NAMES = 1000  # of columns, remembered for error messages
MAX_SHOWN = 30
MAX_TEXT_BYTES = 1 << 30
NOT_IN_PYTHON = (ValueError, OverflowError, KeyError, pa.ArrowException)  # KeyError: an unknown time zone


def is_table(name: str) -> bool:
    return name.endswith(TABLES)


def read_texts(file: Path, where: str) -> tuple[list[str], Drops]:
    """All texts of a file, in order, decoded as those of a corpus, and the documents that could not be read.

    Args:
        where: the setting that names the file; error messages start with it.

    Raises:
        InputError: the file cannot be read, its table has no column `text`, or no text is left.
    """
    cfg = FilterConfig(min_bytes=1, max_bytes=MAX_TEXT_BYTES)
    reader = Reader(file.name, where, SourceConfig(path=str(file)), (), cfg)
    drops = Drops()
    texts: list[str] = []
    for raw in batches(reader.read(file.name, file), file.name, drops):
        decoded, undecoded = steps.decode(raw, cfg)
        for item in undecoded:
            drops.add(item)
        texts += decoded.column("text").to_pylist()
    reader.check_columns()
    if not texts:
        raise InputError(
            f"{where}: {file} holds no text ({drops.summary() or 'it is empty'}); give a file of documents"
        )
    return texts, drops


class Reader:
    """Documents of the files of one source.

    Args:
        where: the setting that names a column, with `{field}` for `text_field` and the others.
    """

    def __init__(
        self, source: str, where: str, cfg: SourceConfig, allowed: tuple[str, ...], filters: FilterConfig
    ) -> None:
        self.source = source
        self.where = where
        self.cfg = cfg
        self.allowed = allowed
        self.max_raw_bytes = steps.max_raw_bytes(filters)
        self.max_line_bytes = BYTES_PER_ESCAPE * self.max_raw_bytes + OTHER_COLUMNS_BYTES
        fields = (cfg.text_field, cfg.group_field, cfg.license_field)
        self.columns = list(dict.fromkeys(field for field in fields if field is not None))
        self._json_columns: dict[str, None] = {}  # in order of appearance
        self._num_documents = 0

    def read(self, name: str, path: Path, group: str | None = None) -> Iterator[Document | Dropped]:
        """The documents of a file. `name` is the id of a text, and the first part of the id of a row."""
        try:
            with open_file(path) as file:
                if not is_table(path.name):
                    items: Iterator[Document | Dropped] = iter([self._text(name, file, group or name)])
                elif path.name.endswith(".parquet"):
                    items = self._parquet(name, file)
                else:
                    items = self._json_lines(name, file, COMPRESSION.get(path.suffix, lambda plain: plain))
                for item in items:
                    self._num_documents += isinstance(item, Document)
                    yield item
        except DAMAGE as error:  # no permission, or not the format that its name says
            yield Dropped("unreadable", name, self.source, file_size(path), excerpt_of(str(error)))

    def document(self, id: str, row: Mapping[str, Any]) -> Document | Dropped:
        """The document of one row. Texts are strings or bytes."""
        text = row.get(self.cfg.text_field)
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogatepass")  # the decode step drops half a surrogate pair, with a reason
        if not isinstance(text, bytes):
            return Dropped("no_text", id, self.source, 0, excerpt_of(f"columns: {', '.join(map(str, row))}"))
        if len(text) > self.max_raw_bytes:
            return Dropped("too_long", id, self.source, len(text), excerpt_of(text))
        group, license = id, self.cfg.license
        if self.cfg.group_field is not None:
            value = row.get(self.cfg.group_field)
            if value is None or value in ("", b""):
                return Dropped("no_group", id, self.source, len(text), excerpt_of(text))
            group = _as_str(value)
        if self.cfg.license_field is not None:
            value = row.get(self.cfg.license_field)
            license = licenses.normalise(_as_str(value)) if isinstance(value, str | bytes) else licenses.UNKNOWN
            if not licenses.is_allowed(license, self.allowed):
                return Dropped(f"license:{license}", id, self.source, len(text), excerpt_of(text))
        return Document(id, text, group, license or licenses.UNKNOWN)

    def check_columns(self) -> None:
        """After all files: raises InputError for a column that no row of a JSONL file has."""
        for column in self.columns if self._json_columns else ():
            if column not in self._json_columns and (column != self.cfg.text_field or not self._num_documents):
                raise self.no_column(column, str(self.cfg.path), list(self._json_columns))

    def check_schema(self, schema: pa.Schema, where: str) -> None:
        """Raises InputError for a missing column, and for texts in a column of another type."""
        for column in self.columns:
            if schema.names.count(column) != 1:
                raise self.no_column(column, where, schema.names)
        kind = schema.field(self.cfg.text_field).type
        if not _is_text(kind) and not pa.types.is_null(kind):
            raise InputError(
                f"{self.where.format(field='text_field')}: column {self.cfg.text_field!r} of {where} holds {kind}, "
                "not text; name a column of text"
            )

    def no_column(self, column: str, where: str, columns: list[str]) -> InputError:
        field = next(f for f in ("text_field", "group_field", "license_field") if getattr(self.cfg, f) == column)
        problem = f"{columns.count(column)} columns" if column in columns else "no column"
        names = _as_str(", ".join(columns[:MAX_SHOWN]) + (", ..." if len(columns) > MAX_SHOWN else ""))
        return InputError(f"{self.where.format(field=field)}: {where} has {problem} {column!r}; it has {names}")

    def _text(self, name: str, file: BinaryIO, group: str) -> Document | Dropped:
        data = b""
        while len(data) <= self.max_raw_bytes and (piece := file.read(READ_BYTES)):
            data += piece
        if len(data) > self.max_raw_bytes:
            size = os.fstat(file.fileno()).st_size
            return Dropped("too_long", name, self.source, size, excerpt_of(data))
        if self.cfg.license_field is not None:
            return Dropped(f"license:{licenses.UNKNOWN}", name, self.source, len(data), excerpt_of(data))
        return Document(name, data, group, self.cfg.license or licenses.UNKNOWN)

    def _json_lines(self, name: str, file: BinaryIO, unpack: Callable[[BinaryIO], Any]) -> Iterator[Document | Dropped]:
        number = 0
        try:
            for line, num_bytes in limited_lines(unpacked(file, unpack), self.max_line_bytes):
                rows = [(line, num_bytes, parse_row(line, num_bytes))]
                if rows[0][2] == "not_json" and b"\r" in line.strip():  # the line ends of old Macs
                    rows = [
                        (part, len(part) + 1, parse_row(part, len(part))) for part in line.split(b"\r") if part.strip()
                    ]
                for part, size, row in rows:
                    yield self._json_row(f"{name}#{number}", part, size, row)
                    number += 1
        except DAMAGE as error:  # the number of rows behind the damage is unknown
            size = os.fstat(file.fileno()).st_size
            unread = size - file.tell() if number and file.seekable() else size
            yield Dropped("unreadable", f"{name}#{number}", self.source, unread, excerpt_of(str(error)))

    def _json_row(self, id: str, line: bytes, num_bytes: int, row: dict[str, Any] | str) -> Document | Dropped:
        if isinstance(row, str):
            return Dropped(row, id, self.source, num_bytes, excerpt_of(line))
        names = row if len(self._json_columns) < MAX_NAMES else [name for name in self.columns if name in row]
        self._json_columns.update(dict.fromkeys(names))
        try:
            return self.document(id, row)
        except RecursionError:  # a group nested as deeply as the parser allows
            return Dropped("not_json", id, self.source, num_bytes, excerpt_of(line))

    def _parquet(self, name: str, file: BinaryIO) -> Iterator[Document | Dropped]:
        with pq.ParquetFile(file) as table:
            self.check_schema(table.schema_arrow, name)
            number = 0
            for group in range(table.num_row_groups):
                described = table.metadata.row_group(group)
                done, problem = 0, "the file has fewer rows than it says"
                try:
                    for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=self.columns):
                        for row in arrow_rows(batch):
                            yield self.document(f"{name}#{number + done}", row)
                            done += 1
                except DAMAGE as error:
                    problem = str(error)
                if (lost := described.num_rows - done) > 0:
                    num_bytes = described.total_byte_size * lost // described.num_rows
                    id = f"{name}#{number + done}"
                    yield Dropped("unreadable", id, self.source, num_bytes, excerpt_of(problem), num_documents=lost)
                number += described.num_rows


# ---- rows ----------------------------------------------------------------------------------------------


def unpacked(file: BinaryIO, unpack: Callable[[BinaryIO], Any]) -> Iterator[bytes]:
    """The bytes of an archive up to the first damage, whose error is then raised."""
    num_bytes = 0
    try:
        stream = unpack(file)
        while piece := stream.read1(PIECE):
            num_bytes += len(piece)
            yield piece
    except SWALLOWS_OUTPUT:
        file.seek(0)
        stream = unpack(file)
        while num_bytes and (piece := stream.read1(min(num_bytes, PIECE))):
            num_bytes -= len(piece)
        while piece := stream.read1(1):
            yield piece


def limited_lines(pieces: Iterator[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """Non-blank lines and their sizes. Only the first bytes of a line above `limit` are held and given.

    Gives what it has before it raises an error of `pieces`.
    """
    held: list[bytes] = []
    size = 0
    problem: Exception | None = None
    try:
        for piece in pieces:
            start = 0
            while (end := piece.find(b"\n", start) + 1) or start < len(piece):
                part = piece[start : end or None]
                start += len(part)
                size += len(part)
                if size <= limit:
                    held.append(part)
                elif size - len(part) <= limit:  # the first part above the limit
                    held = [b"".join(held)[:EXCERPT_BYTES] or part[:EXCERPT_BYTES]]
                if end:
                    line = b"".join(held)
                    if line.strip():
                        yield line, size
                    held, size = [], 0
    except DAMAGE as error:
        problem = error
    line = b"".join(held)
    if line.strip():
        yield line, size
    if problem:
        raise problem


def parse_row(line: bytes, num_bytes: int) -> dict[str, Any] | str:
    """A line of JSON as a dictionary, or the reason why it is none."""
    if num_bytes > len(line):
        return "row_too_long"
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return "not_json"
    except UnicodeDecodeError:
        return "not_utf8"
    except ValueError:  # an integer of more digits than Python converts
        row = json.loads(line, parse_int=_short_int)
    except RecursionError:
        return "not_json"
    return row if isinstance(row, dict) else "not_json"


def arrow_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries. Texts are bytes, because Arrow does not promise that they are UTF-8."""
    columns = [_cells(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _cells(column: pa.Array) -> list[Any]:
    if isinstance(column, pa.ExtensionArray) and _is_text(column.type.storage_type):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    match str(column.type):
        case "string":
            column = column.cast(pa.binary())
        case "large_string":
            column = column.cast(pa.large_binary())
        case "string_view":
            column = column.cast(pa.binary_view())
    try:
        cells: list[Any] = column.to_pylist()
    except NOT_IN_PYTHON:
        cells = [_cell(cell) for cell in column]
    return cells


def _cell(cell: pa.Scalar) -> Any:
    """A value, or the integer that stores it where Python has none: dates after 9999, unknown time zones."""
    try:
        return cell.as_py()
    except NOT_IN_PYTHON:
        return getattr(cell, "value", None)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return str(kind).removeprefix("large_").removesuffix("_view") in ("string", "binary")


def _as_str(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.encode("utf-8", "replace").decode()


def _short_int(digits: str) -> int | None:
    try:
        return int(digits)
    except ValueError:
        return None
