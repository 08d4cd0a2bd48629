"""Calls of C functions whose arguments are all numbers of 64 bits, so that they can be kept and made again."""

import ctypes
import operator
import struct
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Call:
    """kinds: of each argument a letter: n a whole number, f a float in 32 bits, p a tensor's address or any, s a
    structure's. `tensors`: those among the arguments, and others whose addresses the structures hold.
    """

    def __init__(self, function: Any, arguments: tuple[Any, ...], kinds: str, inside: tuple[Tensor, ...]) -> None:
        assert len(arguments) == len(kinds)
        self.function, self.slots = function, (ctypes.c_uint64 * len(kinds))(*map(_slot, kinds, arguments))
        self.tensors = (*inside, *(a for a in arguments if isinstance(a, Tensor)))
        self._arguments = arguments  # they must live as long as their addresses are here

    def __call__(self) -> None:
        self.function(self.slots)


def _slot(kind: str, argument: Any) -> int:
    if kind == "p":
        return argument.data_ptr() if isinstance(argument, Tensor) else argument or 0
    if kind == "f":
        return int.from_bytes(struct.pack("<f", argument), "little")
    if kind == "n":
        return operator.index(argument)
    assert isinstance(argument, ctypes.Structure)
    return ctypes.addressof(argument)


class _Kept(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("slots", ctypes.c_void_p))


class Replay:
    """Calls, made again one after the other. function: `replay` in native/cpu.cpp."""

    def __init__(self, function: Any, calls: Sequence[Call]) -> None:
        self.calls, self._function = calls, function
        function.argtypes, function.restype = (ctypes.c_int64, ctypes.c_void_p), None
        kept = (_Kept(ctypes.cast(c.function, ctypes.c_void_p).value, ctypes.addressof(c.slots)) for c in calls)
        self._array = (_Kept * len(calls))(*kept)

    def __call__(self) -> None:
        self._function(len(self.calls), self._array)
