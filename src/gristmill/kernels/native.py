"""The C++ kernels as torch operators, `torch.ops.gristmill.*`; the package's build compiles them where a compiler is.

One library holds them for several instruction sets; the best that the CPU has is used. Without the library, or for
other dtypes than fp32 and bf16, the callers' own PyTorch code runs. GRISTMILL_KERNELS=NAME asks for another set, or for
"torch": PyTorch's own.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import machinery
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.kernels.arguments import ARGUMENTS, ExpertSizes, Heads, Matrix, PagedSizes, Sizes
from gristmill.kernels.calls import Call, Replay

ISAS = ("plain", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # each CPU that runs one runs those before it
INTERFACE = 5  # of the C functions; raised with cpu.cpp when one changes
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_in_use: str | None = None


@functools.cache
def _library() -> ctypes.CDLL | None:
    for suffix in machinery.EXTENSION_SUFFIXES:
        if (file := Path(__file__).with_name(f"_native{suffix}")).exists():
            try:
                library = ctypes.CDLL(str(file))
            except OSError:  # built for another machine, or beside another OpenMP than torch's
                return None
            # A library that an earlier version built would read other arguments than it is given.
            return library if hasattr(library, "interface") and library.interface() == INTERFACE else None
    return None


@functools.cache
def _process() -> ctypes.CDLL:
    """All that this process has loaded: the OpenMP that torch and the library share, of which a call affects only the
    calling thread. `torch.set_num_threads` would also change the number with which other threads begin."""
    return ctypes.CDLL(None)


class Constants(NamedTuple):
    """Constants of the C++ kernels, defined in native/constants.h.

    panel: outputs of a panel of a packed matrix. depth: the inner dimension of a product is padded to a multiple of
    it. block: the most heads that may share a key head.
    """

    panel: int
    depth: int
    block: int


@functools.cache
def constants() -> Constants:
    library = _library()
    assert library is not None
    library.constants.restype = ctypes.POINTER(ctypes.c_int64)
    return Constants(*library.constants()[: len(Constants._fields)])


def available() -> list[str]:
    """What kernels this process can run, the best last: "torch", then instruction sets."""
    library = _library()
    built = [] if library is None else ISAS[: library.best_isa() + 1]
    return ["torch", *(isa for isa in built if hasattr(library, f"rotate_f32_{isa}"))]


def use(name: str) -> None:
    """Choose the kernels of this process, before anything is packed for others; each set rounds differently.

    Raises InputError where it cannot run here.
    """
    global _in_use
    if name not in (possible := available()):
        raise InputError(f"kernels {name!r} cannot run here: this machine and installation have {', '.join(possible)}")
    _in_use = name


def in_use() -> str:
    if _in_use is None:
        use(os.environ.get("GRISTMILL_KERNELS") or available()[-1])
    assert _in_use is not None
    return _in_use


def compute_alone() -> None:
    """In the calling thread, from now on: work beside the others, who have the cores."""
    torch.get_num_threads()  # has torch set this thread's number first
    if (library := _library()) is not None:
        library.compute_alone()


@functools.cache
def _set_mkl_threads() -> Callable[[int], int]:
    """Return MKL's function that sets the calling thread's number of threads (0: MKL's choice) and returns the old one.

    PyTorch computes cos and sin with MKL, which does not ask OpenMP for the number of threads.
    """
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function: Callable[[int], int] = torch_library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # PyTorch was built without MKL
        return lambda threads: 0
    return function


@contextmanager
def team(threads: int) -> Iterator[None]:
    """Run this thread's kernels on `threads` threads of the library's own instead of OpenMP's, see native/team.cpp.

    Its PyTorch operations, which are small between such kernels, run on one thread. Other threads are not affected.
    """
    if (library := _library()) is None:
        yield
        return
    torch.get_num_threads()  # torch sets this thread's number at the first use, which must not happen below
    openmp = _process()
    torch_threads, members = openmp.omp_get_max_threads(), library.set_team(threads)
    library.compute_alone()
    mkl_threads = _set_mkl_threads()(1)
    try:
        yield
    finally:
        library.set_team(members)
        _set_mkl_threads()(mkl_threads)
        openmp.omp_set_num_threads(torch_threads)


def yield_cores(on: bool) -> None:
    """While on, this process's threads sleep whenever they wait: for machines on which others take the CPUs.

    The bits stay the same. Does nothing without the library.
    """
    if (library := _library()) is not None:
        library.yield_cores(on)


def serves(x: Tensor) -> bool:
    """Whether the native kernels take a tensor like x."""
    return x.device.type == "cpu" and x.dtype in TYPES and in_use() != "torch"


class _Thread(threading.local):
    """What concerns one thread: a recording never sees another thread's calls."""

    record: Callable[[Call], None] | None = None


_thread = _Thread()


@contextmanager
def record_calls(record: Callable[[Call], None]) -> Iterator[None]:
    """Give each call of this thread to `record`, after it was made."""
    before, _thread.record = _thread.record, record
    try:
        yield
    finally:
        _thread.record = before


def replay(calls: Sequence[Call]) -> Replay:
    library = _library()
    assert library is not None
    return Replay(library.replay, calls)


def _call(name: str, like: Tensor, *arguments: Any, inside: tuple[Tensor, ...] = ()) -> None:
    """inside: tensors whose addresses lie in structures."""
    call = Call(_function(_library(), name, like.dtype, in_use()), arguments, ARGUMENTS[name], inside)
    call()
    if _thread.record is not None:
        _thread.record(call)


@functools.cache
def _function(library: ctypes.CDLL, name: str, dtype: torch.dtype, isa: str) -> Any:
    function = getattr(library, f"{name}_{TYPES[dtype]}_{isa}")
    function.argtypes, function.restype = (ctypes.c_void_p,), None
    return function


def padded(inputs: int) -> int:
    """Return the inner dimension of a product with its padding."""
    return -(-inputs // constants().depth) * constants().depth


def _given(x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """x with its numbers together, which the library reads without asking. Raises ValueError where it is another."""
    if x.dtype != dtype or x.shape != shape:
        raise ValueError(f"a native kernel got {x.dtype} {list(x.shape)} and takes {dtype} {list(shape)} here")
    return x.contiguous()


def _heads(x: Tensor) -> Heads:
    return Heads(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _sizes(q: Tensor, k: Tensor, starts: Tensor) -> Sizes:
    B, S, H, C = q.shape
    return Sizes(B, S, H, k.shape[2], C, C**-0.5, starts.data_ptr())


def _rows(x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """x, or a copy whose last dimension lies together."""
    return x if x.stride(-1) == 1 and x.dtype == dtype and x.shape == shape else _given(x, dtype, *shape)


def _glu(h: Tensor, weight: Tensor, act: Tensor) -> None:
    P, F = act.shape
    assert act.is_contiguous()
    _call("glu_forward", h, P, F, _given(h, act.dtype, P, 2 * F), _given(weight, torch.float32, P), act)


def _glu_backward(h: Tensor, weight: Tensor, grad: Tensor, act: Tensor, dh: Tensor, dweight: Tensor) -> None:
    P, F = act.shape
    for out, dtype, shape in ((act, h.dtype, (P, F)), (dh, h.dtype, (P, 2 * F)), (dweight, torch.float32, (P,))):
        assert out.is_contiguous()
        _given(out, dtype, *shape)
    inputs = _given(h, h.dtype, P, 2 * F), _given(weight, torch.float32, P), _given(grad, h.dtype, P, F)
    _call("glu_backward", h, P, F, *inputs, act, dh, dweight)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    T, V = logits.shape
    assert logits.is_contiguous()  # it is changed in place
    targets, nll = _given(targets, torch.int64, T), torch.empty(T, dtype=torch.float32)
    _call("cross_entropy", logits, T, V, logits, targets, nll)
    return nll


def add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """All of one dtype and shape, with their numbers together."""
    _call("add", out, out.numel(), a, b, out)


def widen(x: Tensor, out: Tensor) -> None:
    """out: fp32. Both with their numbers together."""
    _call("widen", x, x.numel(), x, out)


def route(logits: Tensor, bias: Tensor | None, top_k: int, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels/router.py. power: 0 is for none."""
    T, E = logits.shape
    assert 1 <= top_k <= E
    logits, bias = _given(logits, torch.float32, T, E), None if bias is None else _given(bias, torch.float32, E)
    probs, weights = logits.new_empty(T, E), logits.new_empty(T, top_k)
    ids = logits.new_empty(T, top_k, dtype=torch.long)
    _call("route", logits, T, E, top_k, power, logits, bias, probs, weights, ids)
    return probs, weights, ids


def rotate(x: Tensor, cos: Tensor, sin: Tensor, turned: int, clip: float) -> Tensor:
    tokens, heads, width = x.shape
    out = x.new_empty(tokens, heads, width)
    cos, sin = (_given(angle, torch.float32, tokens, width // 2) for angle in (cos, sin))
    _call("rotate", x, tokens, heads, width, turned, x, x.stride(0), cos, sin, clip, out)
    return out


def rotate_normed(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, queries: int, keys: int
) -> Tensor:
    """x [T, N, C] with its first `queries` and then `keys` heads normed and turned. No gradient."""
    (tokens, N, C), out = x.shape, x.new_empty(x.shape)
    weights = (_given(weight, torch.float32, C) for weight in (q_weight, k_weight))
    cos, sin = (_given(angle, torch.float32, tokens, C // 2) for angle in (cos, sin))
    _call("rotate_normed", x, tokens, N, C, queries, keys, x, x.stride(0), *weights, eps, cos, sin, out)
    return out


def _rotate_backward(x: Tensor, cos: Tensor, sin: Tensor, turned: int, clip: float, grad: Tensor) -> Tensor:
    """Of x only where it was clipped is asked."""
    tokens, heads, width = x.shape
    dx, grad = torch.empty(x.shape, dtype=x.dtype), _given(grad, x.dtype, *x.shape)
    cos, sin = (_given(angle, torch.float32, tokens, width // 2) for angle in (cos, sin))
    _call("rotate_backward", x, tokens, heads, width, turned, x, x.stride(0), cos, sin, clip, grad, dx)
    return dx


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    x, weight = x.contiguous(), _given(weight, torch.float32, D)
    out, inverse = x.new_empty(N, D), weight.new_empty(N)
    _call("rms_norm", x, N, D, x, weight, eps, out, inverse)
    return out, inverse


def _rms_norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    (N, D), parts = x.shape, min(len(x), 64)
    inputs = (
        x.contiguous(),
        _given(weight, torch.float32, D),
        _given(inverse, torch.float32, N),
        _given(grad, x.dtype, N, D),
    )
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(parts, D, dtype=torch.float32)
    _call("rms_norm_backward", x, N, D, parts, *inputs, dx, dweight)
    return dx, dweight.sum(0)


def _attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    (B, S, H, C), G = q.shape, k.shape[2]
    q, k, v = _rows(q, q.dtype, B, S, H, C), _rows(k, q.dtype, B, S, G, C), _rows(v, q.dtype, B, S, G, C)
    starts = _given(starts, torch.int64, B, S)
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(B, H, S, dtype=torch.float32)
    _call("attention_forward", q, _sizes(q, k, starts), _heads(q), _heads(k), _heads(v), out, lse)
    return out, lse


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, S, H, C), G, dtype = q.shape, k.shape[2], q.dtype
    q, out, grad = (_rows(x, dtype, B, S, H, C) for x in (q, out, grad))
    k, v = _rows(k, dtype, B, S, G, C), _rows(v, dtype, B, S, G, C)
    starts, lse = _given(starts, torch.int64, B, S), _given(lse, torch.float32, B, H, S)
    dq, (dk, dv) = torch.empty(q.shape, dtype=dtype), torch.empty(2, B, H, S, C, dtype=torch.float32)
    heads = (_heads(x) for x in (q, k, v, out, grad))
    _call("attention_backward", q, _sizes(q, k, starts), *heads, lse, dq, dk, dv)
    dk, dv = (d.view(B, G, H // G, S, C).sum(2).transpose(1, 2).to(dtype) for d in (dk, dv))
    return dq, dk, dv


def _lay_panels(x: Tensor) -> Tensor:
    """[..., P, M] -> [..., M, P] of numbers of 32 or 16 bits, where P is `constants().panel`."""
    *before, P, M = x.shape
    assert constants().panel == P
    x, out = x.contiguous(), torch.empty(*before, M, P, dtype=x.dtype)
    like = torch.empty(0, dtype=torch.float32 if x.dtype.itemsize == 4 else torch.bfloat16)
    _call("lay_panels", like, x.numel() // (P * M), M, x, out)
    return out


def lay_quantized(words: Tensor, scales: Tensor, bits: int, out: Tensor) -> None:
    """words int32 [N, K * bits / 32] and scales bf16 [N, J] of `quantized.Quantized` as a packed matrix's bytes."""
    (N, J), K = scales.shape, words.shape[1] * 32 // bits
    words, scales = _given(words, torch.int32, N, words.shape[1]), _given(scales, torch.bfloat16, N, J)
    _call("lay_quantized", scales, bits, N, J, K // J, words, scales, out)


def lay_halves(weight: Tensor, out: Tensor) -> bool:
    """weight bf16 [N, K] as a packed matrix's bytes, 12 bits each; whether it fits, see native/halves.h."""
    (N, K), fits = weight.shape, torch.empty(1, dtype=torch.int64)
    assert weight.dtype == torch.bfloat16
    _call("lay_halves", weight, N, K, *weight.stride(), weight, out, fits)
    return bool(fits)


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """[T, K] -> [T, N]: what `torch.ops.gristmill.product` does, without what an operator costs at each call."""
    x, out = x.contiguous(), x.new_empty(len(x), matrix.N)
    _call("product", x, len(x), x, matrix, out)
    return out


def _product(x: Tensor, data: Tensor, kind: int, N: int, group: int) -> Tensor:
    return product(x, Matrix(data.data_ptr(), kind, N, x.shape[1], group))


def packed_experts(x: Tensor, weights: Tensor, ids: Tensor, places: Tensor, kind: int, F: int, group: int) -> Tensor:
    """places: [E], the address of each expert that a token chose: there its three matrices lie."""
    (T, D), K = x.shape, ids.shape[1]
    weights, ids = _given(weights, torch.float32, T, K), _given(ids, torch.int64, T, K)
    x, out = x.contiguous(), x.new_empty(T, D)
    sizes = ExpertSizes(T, K, len(places), D, F, kind, group)
    _call("experts", x, sizes, x, weights, ids, places, out)
    return out


def _packed_experts(
    x: Tensor, weights: Tensor, ids: Tensor, blocks: Tensor, slots: Tensor, kind: int, F: int, group: int
) -> Tensor:
    """blocks: [S, bytes], an expert in each; slots: [E], which block is an expert's."""
    return packed_experts(x, weights, ids, slots * blocks.stride(0) + blocks.data_ptr(), kind, F, group)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, parts: Tensor, tables: Tensor
) -> Tensor:
    """q [T, H, C], k and v [T, G, C]; keys and values [N, G, numbers of B positions], see native/paged.h; slots [T]:
    where each token's go; parts [parts, 4]: first token, tokens, position of the first, where its blocks begin in
    tables."""
    (T, H, C), G = q.shape, k.shape[1]
    q, k, v = _rows(q, q.dtype, T, H, C), _rows(k, q.dtype, T, G, C), _rows(v, q.dtype, T, G, C)
    B = keys.shape[2] // padded(C)
    assert constants().block >= H // G
    for cache in (keys, values):
        assert cache.dtype == q.dtype
        assert cache.is_contiguous()
    out = q.new_empty(T, H, C)
    numbers = (x.data_ptr() for x in (slots, parts, tables))
    heads = (Heads(x.data_ptr(), 0, x.stride(0), x.stride(1)) for x in (q, k, v))
    sizes = PagedSizes(T, H, G, C, B, len(parts), C**-0.5, *numbers)
    inside = q, k, v, slots, parts, tables
    _call("paged_attention", q, sizes, *heads, keys, values, out, inside=inside)
    return out


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
    "route(Tensor logits, Tensor? bias, int top_k, float power) -> (Tensor, Tensor, Tensor)",
    route,
    lambda logits, bias, top_k, power: (
        logits.new_empty(logits.shape),
        logits.new_empty(len(logits), top_k),
        logits.new_empty(len(logits), top_k, dtype=torch.long),
    ),
)
_define(
    "rotate(Tensor x, Tensor cos, Tensor sin, int turned, float clip) -> Tensor",
    rotate,
    lambda x, cos, sin, turned, clip: x.new_empty(x.shape),
)
_define(
    "rotate_backward(Tensor x, Tensor cos, Tensor sin, int turned, float clip, Tensor grad) -> Tensor",
    _rotate_backward,
    lambda x, cos, sin, turned, clip, grad: x.new_empty(x.shape),
)
_define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    rms_norm,
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
    lambda q, k, v, starts, out, lse, grad: (
        q.new_empty(q.shape),
        *(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (k, v)),  # as they lie when summed over heads
    ),
)
_define("lay_panels(Tensor x) -> Tensor", _lay_panels, lambda x: x.new_empty(x.mT.shape))
_define(
    "product(Tensor x, Tensor data, int kind, int N, int group) -> Tensor",
    _product,
    lambda x, data, kind, N, group: x.new_empty(len(x), N),
)
_define(
    "packed_experts(Tensor x, Tensor weights, Tensor ids, Tensor blocks, Tensor slots, int kind, int F, int group)"
    " -> Tensor",
    _packed_experts,
    lambda x, weights, ids, blocks, slots, kind, F, group: x.new_empty(x.shape),
)
_define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor parts,"
    " Tensor tables) -> Tensor",
    paged_attention,
    lambda q, k, v, keys, values, slots, parts, tables: q.new_empty(q.shape),
)
