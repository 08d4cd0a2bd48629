"""The cleaning steps on single batches."""

import base64
import random
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.corpus import steps
from gristmill.corpus.config import FilterConfig
from gristmill.corpus.documents import RAW, Document, Dropped, Drops, batches

CFG = FilterConfig()
PROSE = "The mill grinds what it is given, and what it is given it grinds well enough to eat.\n" * 1


def raw(*datas: bytes) -> pa.RecordBatch:
    rows = [{"id": str(n), "data": data, "source": "s", "group": "g", "license": "MIT"} for n, data in enumerate(datas)]
    return pa.RecordBatch.from_pylist(rows, RAW)


def why(data: bytes, cfg: FilterConfig = CFG) -> str | None:
    decoded, dropped = steps.decode(raw(data), cfg)
    kept, more = steps.judge(decoded, cfg)
    assert kept.num_rows + len(dropped + more) == 1
    return (dropped + more)[0].reason if dropped + more else None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PROSE.encode(), None),
        (("水車は与えられたものを挽く。" * 30).encode(), None),  # no blanks, no ASCII: still prose
        (("Водяная мельница мелет зерно. " * 10).encode(), None),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + PROSE.encode(), "binary"),
        (PROSE.encode("utf-16"), "binary"),
        (("é" + PROSE).encode("latin-1"), "not_utf8"),
        (PROSE.encode() + "\ud800".encode("utf-8", "surrogatepass"), "not_utf8"),
        (b"short", "too_short"),
        (b" \n" * 500, "too_short"),
        (b"", "too_short"),
        (b"word " * 11_000, "long_line"),
        ((b"word " * 1_400 + b"\n") * 2, "long_lines"),
        (base64.b64encode(random.Random(1).randbytes(3000)), "long_words"),
        ("\n".join(str(n * 7919) for n in range(300)).encode(), "few_letters"),
        ("\n".join(f"the row {n * 7919} and {n}" for n in range(300)).encode(), "many_digits"),
        (PROSE.encode() * 50, "repeated_lines"),
    ],
)
def test_each_kind_of_bad_text_is_dropped_with_its_reason(data, reason):
    assert why(data) == reason


def test_line_ends_and_byte_order_marks_are_normalised_and_nothing_else():
    text = "\ufeffcafe\u0301 and caf\u00e9\r\nsecond\rthird\tword\n" + PROSE
    kept, _ = steps.decode(raw(text.encode()), CFG)
    assert kept["text"][0].as_py() == "cafe\u0301 and caf\u00e9\nsecond\nthird\tword\n" + PROSE


@settings(max_examples=100)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=150), max_size=6))
def test_signals_equal_a_plain_count(texts):
    found = steps.measure(pa.array(texts, pa.string()))
    for row, text in enumerate(texts):
        data = text.encode()
        lines = re.findall(rb"[^\n]*\n|[^\n]+$", data)
        solid = [byte for byte in data if byte not in b" \t\n\r\f\v"]
        letters = [byte for byte in solid if byte >= 0x80 or chr(byte).isalpha()]
        words = [match for match in re.findall(rb"[^ \t\n\r\f\v\x80-\xff]*[ \t\n\r\f\v\x80-\xff]?", data) if match]
        assert found.num_bytes[row] == len(data)
        assert found.num_lines[row] == len(lines)
        assert found.max_line_bytes[row] == max(map(len, lines))
        assert found.alpha_share[row] == pytest.approx(len(letters) / max(len(solid), 1))
        assert found.digit_share[row] == pytest.approx(
            sum(byte in b"0123456789" for byte in solid) / max(len(solid), 1)
        )
        long_bytes = sum(len(word) for word in words if len(word) > steps.LONG_WORD_BYTES)
        assert found.long_word_share[row] == pytest.approx(long_bytes / len(data))


def test_signals_of_a_slice_are_those_of_its_own_rows():
    texts = pa.array(["skipped 1\n", "one two\nthree", "x" * 90])
    whole, part = steps.measure(texts), steps.measure(texts.slice(1))
    assert np.array_equal(whole.alpha_share[1:], part.alpha_share)
    assert np.array_equal(whole.long_word_share[1:], part.long_word_share)


def test_exact_duplicates_ignore_blanks_and_name_the_one_that_stays():
    exact = steps.ExactDuplicates()
    batch, _ = steps.decode(raw(PROSE.encode(), PROSE.replace(" ", "\n\t").encode(), PROSE.upper().encode()), CFG)
    kept, dropped = exact(batch)
    assert kept["id"].to_pylist() == ["0", "2"]
    assert [(item.reason, item.id, item.duplicate_of) for item in dropped] == [("duplicate", "1", "0")]
    again, dropped = exact(batch)  # the memory spans batches
    assert again.num_rows == 0
    assert {item.duplicate_of for item in dropped} == {"0", "2"}


def test_batches_hold_every_document_in_order_and_count_the_drops():
    items = [
        Document(str(n), b"x" * n * 1000, "g", "MIT") if n % 5 else Dropped("why", str(n), "s", n, "")
        for n in range(500)
    ]
    drops = Drops()
    ids = [id for batch in batches(items, "s", drops) for id in batch["id"].to_pylist()]
    assert ids == [str(n) for n in range(500) if n % 5]
    assert drops.reasons["why"]["count"] == 100
    assert len(drops.reasons["why"]["examples"]) == 5
