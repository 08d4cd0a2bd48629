"""Samples with a column of every plain encoding. Imported by both sides, so it needs numpy alone."""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

SCALARS = [f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)] + ["float16", "float32", "float64"]
FEW_COLUMNS = {
    "text": "str",
    "raw": "bytes",
    "count": "int",
    "meta": "json",
    "digits": "str_int",
    "real": "str_float",
    "money": "str_decimal",
    "free": "ndarray",
}
COLUMNS = {
    **FEW_COLUMNS,
    **{f"a_{name}": name for name in SCALARS},
    **{f"typed_{name}": f"ndarray:{name}" for name in SCALARS},
    **{f"fixed_{name}": f"ndarray:{name}:2,3" for name in SCALARS},
}
REALS = (0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan)
MONEY = ("0.10", "-1E+30", "123456789012345678901234567890.12", "NaN", "Infinity", "-0.00", "1e-50")
# The default level of each, and others: some libraries take a level of 0 for none given.
COMPRESSIONS = (None, "br", "br:0", "bz2", "bz2:1", "gz", "gz:0", "gz:1", "snappy", "zstd", "zstd:1", "zstd:22")
SIZE_LIMIT = 4000


def folder_name(compression: str | None) -> str:
    return (compression or "plain").replace(":", "-")


def rows() -> list[dict[str, Any]]:
    return [_row(i) for i in range(len(REALS))]


def _row(i: int) -> dict[str, Any]:
    sample: dict[str, Any] = {
        "text": "grain é🌾" * i,
        "raw": bytes(range(i)),
        "count": (-1) ** i * (2**63 - 1 - i),
        "meta": {"i": [i, None, "é", 0.1], "": {}},
        "digits": (-1) ** i * 10 ** (i * 40),
        "real": REALS[i],
        "money": Decimal(MONEY[i]),
        "free": np.arange(i + 1, dtype=SCALARS[i]).reshape((1,) * i + (-1,)),
    }
    for name in SCALARS:
        limits = np.finfo(name) if name.startswith("float") else np.iinfo(name)
        sample[f"a_{name}"] = (limits.min, limits.max, 0)[i % 3]
        sample[f"typed_{name}"] = np.full((i + 1, 2), sample[f"a_{name}"], name)
        sample[f"fixed_{name}"] = np.full((2, 3), sample[f"a_{name}"], name)
    # Lengths of an axis are stored in one byte or two.
    sample["typed_uint8"] = np.full(300 if i == 2 else 255, i, np.uint8)
    return sample


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The columns whose values, types or shapes are not the same. -0.0 is not 0.0, Decimal("1.0") not Decimal("1")."""
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if _seen(found, name) != _seen(expected, name)]


def _seen(sample: Mapping[str, Any], name: str) -> Any:
    if name not in sample:
        return "absent"
    value, encoding = sample[name], COLUMNS[name]
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if encoding in SCALARS:
        return np.asarray(value, encoding).tobytes()
    return type(value), repr(value)
