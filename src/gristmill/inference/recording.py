"""What a forward pass calls, recorded once and made again: a step of decoding is thousands of small calls, and most of
Python's time goes into finding out which. (CUDA graphs do this for a GPU.)

The tensors stay where they are; what changes from step to step is written into the inputs. Only calls that depend on
those are kept, and of them only what the result depends on.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gristmill.kernels import native
from gristmill.kernels.calls import Call
from gristmill.kernels.memory import CACHE_LINE
from gristmill.kernels.packed import aligned_empty

aten = torch.ops.aten


def _embedded(weight: Tensor, ids: Tensor, *_padding: Any, out: Tensor) -> None:
    """In a third of the time that torch's own takes for a few ids."""
    torch.index_select(weight, 0, ids.flatten(), out=out.flatten(0, -2))


# What computes into a given tensor. torch's own functions where they can: an operator costs several times their call.
INTO: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.cos.default: torch.cos,
    aten.sin.default: torch.sin,
    aten.clamp.default: torch.clamp,
    aten.mean.dim: torch.mean,
    aten.stack.default: torch.stack,
    aten.embedding.default: _embedded,
    aten.native_layer_norm.default: aten.native_layer_norm.out,
}
COPIES = (aten._to_copy.default, aten.clone.default)
ADDS = aten.scatter_add_.default  # to what is there: no result may need it
MAKERS = (aten.ones_like.default, aten.new_zeros.default)  # of the same at each pass
PIECE = 1 << 24  # bytes


class NotRecordable(Exception):
    """The pass computes something that cannot be made again in place."""


@dataclass(frozen=True)
class Recorded:
    """`written`: None for a native call, which may write any of its tensors."""

    call: Callable[[], Any]
    read: set[int]
    written: set[int] | None


class Scratch:
    """Memory for what a pass computes. All recordings have it from its beginning on, as one is made again at a time."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self.rewind()

    def rewind(self) -> None:
        self._piece = self._next = 0

    def moved(self, x: Any) -> Any:
        """A tensor's copy in here; what else it may be, as it is."""
        if not isinstance(x, Tensor) or not x.is_contiguous() or x.numel() == 0:
            return x
        size = -(-x.nbytes // CACHE_LINE) * CACHE_LINE
        while self._piece < len(self._pieces) and self._next + size > len(self._pieces[self._piece]):
            self._piece, self._next = self._piece + 1, 0
        if self._piece == len(self._pieces):
            self._pieces.append(aligned_empty(max(size, PIECE)))
        place = self._pieces[self._piece].numpy()[self._next : self._next + x.nbytes]  # a storage of its own
        self._next += size
        return torch.from_numpy(place).view(x.dtype).view(x.shape).copy_(x)


class Recording(TorchDispatchMode):
    """make: the pass. inputs: what it reads that changes. `replay` computes anew what `make` gave, in its place. It
    stands there until a recording of the same scratch is made again."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], scratch: Scratch) -> None:
        super().__init__()
        self._scratch = scratch
        scratch.rewind()
        self._recorded: list[Recorded] = []
        self._changing = {_storage(x) for x in inputs}
        self._kept: list[Tensor] = list(inputs)  # their memory may go to no one else
        with self, native.record_calls(self._native):
            self.made = make()
        calls = [one.call for one in self._needed()]
        self.calls: list[Callable[[], Any]] = []
        for is_native, group in itertools.groupby(calls, lambda call: isinstance(call, Call)):
            together: list[Any] = list(group)
            self.calls += [native.replay(together)] if is_native else together

    def replay(self) -> None:
        for call in self.calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, read = func(*args, **(kwargs or {})), _tensors((args, kwargs))
        self._kept += read
        if func is aten.new_empty.default:
            return self._scratch.moved(made)
        if not any(_storage(x) in self._changing for x in read) or func.is_view or func in MAKERS:
            self._kept += _tensors(made)
            return made
        if func is not ADDS:
            made = tree_map(self._scratch.moved, made)
        outputs = _tensors(made)
        self._kept += outputs
        call: Callable[[], Any]
        if func is aten.add.Tensor and len(read) == 2 and not kwargs and _lie_alike(*read, made):
            native.add(read[0], read[1], made)  # which is recorded as any native call
            return made
        if func in COPIES:
            if _lie_alike(args[0], made, of=(torch.bfloat16, torch.float32)):
                native.widen(args[0], made)
                return made
            call = partial(made.copy_, args[0])
        elif func is ADDS:
            call = partial(func, *args)
        elif func in INTO:
            call = partial(INTO[func], *args, **(kwargs or {}) | _into(func, made))
        else:
            raise NotRecordable(str(func))
        self._add(Recorded(call, {_storage(x) for x in read}, {_storage(x) for x in outputs}))
        return made

    def _native(self, call: Call) -> None:
        self._kept += call.tensors
        self._add(Recorded(call, {_storage(x) for x in call.tensors}, None))

    def _add(self, one: Recorded) -> None:
        self._recorded.append(one)
        self._changing |= one.read if one.written is None else one.written

    def _needed(self) -> list[Recorded]:
        """Without what computes something that nobody reads."""
        needed, kept = {_storage(x) for x in self.made}, []
        for one in reversed(self._recorded):
            if one.written is None or one.written & needed:
                if isinstance(one.call, partial) and one.call.func is ADDS:
                    raise NotRecordable(str(ADDS))
                kept.append(one)
                needed |= one.read
        return kept[::-1]


def _lie_alike(*tensors: Tensor, of: tuple[torch.dtype, ...] | None = None) -> bool:
    """Whether they are of one shape, their numbers together, and of one native dtype, or of those given."""
    dtypes = of or (tensors[0].dtype,) * len(tensors)
    return native.serves(tensors[0]) and all(
        x.dtype == dtype and x.shape == tensors[0].shape and x.is_contiguous()
        for x, dtype in zip(tensors, dtypes, strict=True)
    )


def _into(func: Any, made: Any) -> dict[str, Any]:
    if func is aten.native_layer_norm.default:
        return dict(zip(("out0", "out1", "out2"), made, strict=True))
    return {"out": made}


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
