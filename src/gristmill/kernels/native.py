"""The C++ kernels as torch operators, `torch.ops.gristmill.*`; the package's build compiles them where a compiler is.

One library holds them for several instruction sets; the best that the CPU has is used. Without the library, or for
other dtypes than fp32 and bf16, the callers' own PyTorch code runs. GRISTMILL_KERNELS=NAME asks for another set, or for
"torch": PyTorch's own.
"""

import ctypes
import functools
import os
from importlib import machinery
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.errors import InputError

ISAS = ("plain", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # each CPU that runs one runs those before it
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_in_use: str | None = None


@functools.cache
def _library() -> ctypes.CDLL | None:
    for suffix in machinery.EXTENSION_SUFFIXES:
        if (file := Path(__file__).with_name(f"_native{suffix}")).exists():
            try:
                return ctypes.CDLL(str(file))
            except OSError:  # built for another machine, or beside another OpenMP than torch's
                return None
    return None


def available() -> list[str]:
    """What kernels this process can run, the best last: "torch", then instruction sets."""
    library = _library()
    built = [] if library is None else ISAS[: library.best_isa() + 1]
    return ["torch", *(isa for isa in built if hasattr(library, f"rotate_f32_{isa}"))]


def use(name: str) -> None:
    """Choose kernels for this process; each set rounds differently. Raises InputError where it cannot run here."""
    global _in_use
    if name not in (possible := available()):
        raise InputError(f"kernels {name!r} cannot run here: this machine and installation have {', '.join(possible)}")
    _in_use = name


def in_use() -> str:
    if _in_use is None:
        use(os.environ.get("GRISTMILL_KERNELS") or available()[-1])
    assert _in_use is not None
    return _in_use


def serves(x: Tensor) -> bool:
    """Whether the native kernels take a tensor like x."""
    return x.device.type == "cpu" and x.dtype in TYPES and in_use() != "torch"


class _Heads(ctypes.Structure):
    """[B, S, heads, C] whose last dimension lies together."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class _Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in "BSHGC"),
        ("scale", ctypes.c_float),
        ("starts", ctypes.c_void_p),
    )


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    """Tensors go as pointers, numbers as 64 bits or as floats."""
    given = [
        ctypes.c_void_p(a.data_ptr())
        if isinstance(a, Tensor)
        else ctypes.c_int64(a)
        if isinstance(a, int)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else a
        for a in arguments
    ]
    getattr(_library(), f"{name}_{TYPES[like.dtype]}_{in_use()}")(*given)


def _heads(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _sizes(q: Tensor, k: Tensor, starts: Tensor) -> _Sizes:
    B, S, H, C = q.shape
    return _Sizes(B, S, H, k.shape[2], C, C**-0.5, starts.data_ptr())


def _rows(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension lies together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _glu(h: Tensor, weight: Tensor, act: Tensor) -> None:
    _call("glu_forward", h, *act.shape, h, weight, act)


def _glu_backward(h: Tensor, weight: Tensor, grad: Tensor, act: Tensor, dh: Tensor, dweight: Tensor) -> None:
    _call("glu_backward", h, *act.shape, h, weight, grad, act, dh, dweight)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    assert logits.is_contiguous()  # it is changed in place
    nll = torch.empty(len(logits))
    _call("cross_entropy", logits, *logits.shape, logits, targets.contiguous(), nll)
    return nll


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, turned: int, clip: float) -> Tensor:
    out, cos, sin = torch.empty(x.shape, dtype=x.dtype), cos.contiguous(), sin.contiguous()
    tokens, heads, width = x.shape
    _call("rotate", x, tokens, heads, width, turned, x, x.stride(0), cos, sin, clip, out)
    return out


def _rotate_backward(x: Tensor, cos: Tensor, sin: Tensor, turned: int, clip: float, grad: Tensor) -> Tensor:
    dx, cos, sin, grad = torch.empty(x.shape, dtype=x.dtype), cos.contiguous(), sin.contiguous(), grad.contiguous()
    tokens, heads, width = x.shape
    _call("rotate_backward", x, tokens, heads, width, turned, x, x.stride(0), cos, sin, clip, grad, dx)
    return dx


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    out, inverse = torch.empty(x.shape, dtype=x.dtype), torch.empty(len(x))
    _call("rms_norm", x, *x.shape, x, weight, eps, out, inverse)
    return out, inverse


def _rms_norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, grad, parts = x.contiguous(), weight.contiguous(), grad.contiguous(), min(len(x), 64)
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(parts, x.shape[1])
    _call("rms_norm_backward", x, *x.shape, parts, x, weight, inverse, grad, dx, dweight)
    return dx, dweight.sum(0)


def _attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, starts = _rows(q), _rows(k), _rows(v), starts.contiguous()
    B, S, H, _C = q.shape
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(B, H, S)
    _call("attention_forward", q, _sizes(q, k, starts), _heads(q), _heads(k), _heads(v), out, lse)
    return out, lse


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad, starts = _rows(q), _rows(k), _rows(v), _rows(grad), starts.contiguous()
    B, S, H, C = q.shape
    G = k.shape[2]
    dq, dk, dv = torch.empty(q.shape, dtype=q.dtype), torch.empty(B, H, S, C), torch.empty(B, H, S, C)
    heads = (_heads(x) for x in (q, k, v, out, grad))
    _call("attention_backward", q, _sizes(q, k, starts), *heads, lse, dq, dk, dv)
    dk, dv = (d.view(B, G, H // G, S, C).sum(2).transpose(1, 2).to(q.dtype) for d in (dk, dv))
    return dq, dk, dv


_operators = torch.library.Library("gristmill", "DEF")


def _define(schema: str, cpu: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    _operators.define(schema)
    _operators.impl(name, cpu, "CPU")
    torch.library.register_fake(f"gristmill::{name}", fake)


_define("glu(Tensor h, Tensor weight, Tensor(a!) act) -> ()", _glu, lambda h, weight, act: None)
_define(
    "glu_backward(Tensor h, Tensor weight, Tensor grad, Tensor(a!) act, Tensor(b!) dh, Tensor(c!) dweight) -> ()",
    _glu_backward,
    lambda h, weight, grad, act, dh, dweight: None,
)
_define(
    "cross_entropy(Tensor(a!) logits, Tensor targets) -> Tensor",
    _cross_entropy,
    lambda logits, targets: logits.new_empty(len(logits), dtype=torch.float32),
)
_define(
    "rotate(Tensor x, Tensor cos, Tensor sin, int turned, float clip) -> Tensor",
    _rotate,
    lambda x, cos, sin, turned, clip: x.new_empty(x.shape),
)
_define(
    "rotate_backward(Tensor x, Tensor cos, Tensor sin, int turned, float clip, Tensor grad) -> Tensor",
    _rotate_backward,
    lambda x, cos, sin, turned, clip, grad: x.new_empty(x.shape),
)
_define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm,
    lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)),
)
_define(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor inverse, Tensor grad) -> (Tensor, Tensor)",
    _rms_norm_backward,
    lambda x, weight, inverse, grad: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor starts) -> (Tensor, Tensor)",
    _attention,
    lambda q, k, v, starts: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32),
    ),
)
_define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor out, Tensor lse, Tensor grad)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    lambda q, k, v, starts, out, lse, grad: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)
