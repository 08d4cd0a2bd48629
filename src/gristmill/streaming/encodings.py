"""The values that an MDS column can hold, and their bytes (MosaicML Streaming's format, version 2).

Written from the format; nothing here imports that library. Numbers are little-endian. `pkl` columns are refused:
reading one would run whatever code its author put there.
"""

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from gristmill.errors import InputError

UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
SIGNED = ("int8", "int16", "int32", "int64")
FLOATING = ("float16", "float32", "float64")
SCALARS = (*UNSIGNED, *SIGNED, *FLOATING)
TEXTS: dict[str, type[Any]] = {"str_int": int, "str_float": float, "str_decimal": Decimal}
# An array whose type is not in the header starts with this byte: its bits, plus 1 if signed, 2 if floating.
TYPE_CODES = {
    name: 8 * np.dtype(name).itemsize + variant
    for variant, names in enumerate((UNSIGNED, SIGNED, FLOATING))
    for name in names
}
TYPE_NAMES = {code: name for name, code in TYPE_CODES.items()}
SHAPE_TYPES = ("<u1", "<u2", "<u4", "<u8")


@dataclass(frozen=True)
class Encoding:
    """`size`: bytes of every value, None where values differ (their sizes then stand at the head of the sample)."""

    size: int | None
    encode: Callable[[Any], bytes]
    decode: Callable[[memoryview], Any]


def encoding(name: str) -> Encoding:
    """The encoding of that name: bytes, str, int, json, a number as text (str_int, str_float, str_decimal), a scalar
    type, or ndarray[:type[:shape]].

    Raises InputError for any other, and for `pkl` says why.
    """
    if name == "pkl":
        raise InputError("encoding 'pkl' is refused: unpickling runs code from the file; store the column as json")
    if name.startswith("ndarray"):
        return _array(name)
    if name in SCALARS:
        return Encoding(np.dtype(name).itemsize, lambda value: _scalar(value, name), lambda data: _number(data, name))
    if name in TEXTS:
        return _text(TEXTS[name])
    match name:
        case "bytes":
            return Encoding(None, lambda value: _typed(value, bytes), bytes)
        case "str":
            return Encoding(None, lambda value: _typed(value, str).encode(), lambda data: str(data, "utf-8"))
        case "int":
            return Encoding(8, lambda value: _scalar(_typed(value, int), "int64"), lambda d: int(_number(d, "int64")))
        case "json":
            return Encoding(None, lambda value: json.dumps(value).encode(), lambda data: json.loads(bytes(data)))
    known = ", ".join(("bytes", "str", "int", "json", *TEXTS, *SCALARS, "ndarray[:type[:shape]]"))
    raise InputError(f"encoding {name!r} is not supported; use one of {known}")


def _typed(value: Any, expected: type) -> Any:
    if not isinstance(value, expected):
        raise InputError(f"a column of {expected.__name__} was given {type(value).__name__}")
    return value


def _text(kind: type[Any]) -> Encoding:
    """A number as the text that Python prints for it."""

    def encode(value: Any) -> bytes:
        number = kind(_typed(value, kind))  # of a bool too, whose own text is no number
        try:
            return str(number).encode()
        except ValueError as problem:  # Python limits the digits of an int's text
            raise InputError(f"a column of {kind.__name__} as text: {problem}") from None

    return Encoding(None, encode, lambda data: kind(str(data, "utf-8")))


def _little_endian(name: str) -> np.dtype[Any]:
    return np.dtype(name).newbyteorder("<")


def _scalar(value: Any, name: str) -> bytes:
    try:
        exact = float(value) if name in FLOATING else operator.index(value)
        return np.array(exact, name).astype(_little_endian(name)).tobytes()
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"{value!r} does not fit a column of {name}") from None


def _number(data: memoryview, name: str) -> Any:
    return np.frombuffer(data, _little_endian(name))[0]


def _array(name: str) -> Encoding:
    """[type code, unless fixed][4 * axes + log2 bytes per length | lengths, unless fixed][values]."""
    form = re.fullmatch(rf"ndarray(?::({'|'.join(SCALARS)})(?::([1-9]\d*(?:,[1-9]\d*)*))?)?", name)
    if form is None:
        raise InputError(f"encoding {name!r} must be ndarray, ndarray:uint16 or ndarray:uint16:4,5: lengths from 1 up")
    dtype = form[1]
    shape = tuple(map(int, form[2].split(","))) if form[2] else None

    def encode(value: Any) -> bytes:
        if not isinstance(value, np.ndarray) or value.dtype.name not in TYPE_CODES:
            raise InputError(f"a column of {name} was given {getattr(value, 'dtype', type(value).__name__)}")
        if (dtype and value.dtype.name != dtype) or (shape and value.shape != shape):
            raise InputError(f"a column of {name} was given an array of {value.dtype.name}, shape {value.shape}")
        if value.ndim == 0 or value.ndim > 63 or value.size == 0:
            raise InputError(f"an array of shape {value.shape} has no MDS form: 1 to 63 axes, each at least 1 long")
        head = b"" if dtype else bytes([TYPE_CODES[value.dtype.name]])
        if shape is None:
            width = next(i for i in range(4) if max(value.shape) < 1 << (8 << i))
            head += bytes([value.ndim << 2 | width]) + np.array(value.shape, SHAPE_TYPES[width]).tobytes()
        return head + value.astype(_little_endian(value.dtype.name), copy=False).tobytes()

    def decode(data: memoryview) -> Any:
        at = 0 if dtype else 1
        kind = _little_endian(dtype or TYPE_NAMES[data[0]])
        if shape is not None:
            return np.frombuffer(data, kind, offset=at).reshape(shape)
        axes, width = data[at] >> 2, data[at] & 3
        lengths = np.frombuffer(data, SHAPE_TYPES[width], count=axes, offset=at + 1)
        return np.frombuffer(data, kind, offset=at + 1 + (axes << width)).reshape(lengths)

    size = int(np.prod(shape)) * np.dtype(dtype).itemsize if dtype and shape else None
    return Encoding(size, encode, decode)
