"""What a forward pass calls, recorded once and made again: a step of decoding is thousands of small calls, and most of
Python's time goes into finding out which. (CUDA graphs do this for a GPU.)

The tensors stay where they are; what changes from step to step is written into the inputs. Only calls that depend on
those are kept, and of them only what the result depends on.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gristmill.kernels import native

aten = torch.ops.aten
# What computes into a given tensor. torch's own functions where they can: an operator costs several times their call.
INTO: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.cos.default: torch.cos,
    aten.sin.default: torch.sin,
    aten.clamp.default: torch.clamp,
    aten.gather.default: torch.gather,
    aten.mean.dim: torch.mean,
    aten.stack.default: torch.stack,
    aten.topk.default: torch.topk,
    aten.linalg_vector_norm.default: torch.linalg.vector_norm,
    aten._softmax.default: aten._softmax.out,
    aten.embedding.default: aten.embedding.out,
    aten.native_layer_norm.default: aten.native_layer_norm.out,
}
COPIES = (aten._to_copy.default, aten.clone.default)
ADDS = aten.scatter_add_.default  # to what is there: no result may need it
MAKERS = (aten.new_empty.default, aten.ones_like.default, aten.new_zeros.default)  # of the same at each pass


Call: TypeAlias = tuple[Callable[..., Any], Any, dict[str, Tensor]]


class NotRecordable(Exception):
    """The pass computes something that cannot be made again in place."""


class Recording(TorchDispatchMode):
    """make: the pass. inputs: what it reads that changes. `replay` gives the tensor that `make` gave, computed anew."""

    def __init__(self, make: Callable[[], Tensor], inputs: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._read: list[set[int]] = []
        self._written: list[set[int] | None] = []  # None: a native call, which may write any of its tensors
        self._changing = {_storage(x) for x in inputs}
        self._kept: list[Tensor] = list(inputs)  # their memory may go to no one else
        with self, native.recorded_by(self._native):
            self.result = make()
        self._forget_what_nobody_reads()

    def replay(self) -> Tensor:
        for function, arguments, into in self.calls:
            function(*arguments, **into)
        return self.result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        read, outputs = _tensors((args, kwargs)), _tensors(made)
        self._kept += [*read, *outputs]
        if not any(_storage(x) in self._changing for x in read) or func.is_view or func in MAKERS:
            return made
        call: Call
        if func in COPIES:
            call = Tensor.copy_, (made, args[0]), {}
        elif func is ADDS:
            call = func, args, {}
        elif func in INTO:
            call = INTO[func], args, (kwargs or {}) | _into(func, made)
        else:
            raise NotRecordable(str(func))
        self._add(call, {_storage(x) for x in read}, {_storage(x) for x in outputs})
        return made

    def _native(self, function: Callable[..., None], arguments: tuple[Any, ...], tensors: list[Tensor]) -> None:
        self._kept += tensors
        self._add((function, arguments, {}), {_storage(x) for x in tensors}, None)

    def _add(self, call: Call, read: set[int], written: set[int] | None) -> None:
        self.calls.append(call)
        self._read.append(read)
        self._written.append(written)
        self._changing |= read if written is None else written

    def _forget_what_nobody_reads(self) -> None:
        needed, calls = {_storage(self.result)}, []
        for call, read, written in zip(
            reversed(self.calls), reversed(self._read), reversed(self._written), strict=True
        ):
            if written is None or written & needed:
                if call[0] is ADDS:
                    raise NotRecordable(str(ADDS))
                calls.append(call)
                needed |= read
        self.calls = calls[::-1]


def _into(func: Any, made: Any) -> dict[str, Any]:
    if func is aten.native_layer_norm.default:
        return dict(zip(("out0", "out1", "out2"), made, strict=True))
    return {"out": made}


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
