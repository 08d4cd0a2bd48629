"""The arguments of the C functions in native/: their kinds and structures."""

import ctypes


class Heads(ctypes.Structure):
    """A tensor [B, S, heads, C] whose last dimension is contiguous."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class Sizes(ctypes.Structure):
    """The shape of attention over packed documents."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "BSHGC"),
        ("scale", ctypes.c_float),
        ("starts", ctypes.c_void_p),
    )


class Matrix(ctypes.Structure):
    """A packed matrix, see packed.py."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("kind", "N", "K", "group")))


class ExpertSizes(ctypes.Structure):
    """The shape of packed experts."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("tokens", "top_k", "experts", "D", "F", "kind", "group"))


class PagedSizes(ctypes.Structure):
    """The shape of attention over a cache of blocks."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("T", "H", "G", "C", "B", "parts")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("slots", "part", "tables")),
    )


ARGUMENTS = {  # n: an integer, f: a float, p: a pointer, s: one of the structures above
    "glu_forward": "nnppp",
    "glu_backward": "nnpppppp",
    "cross_entropy": "nnppp",
    "add": "nppp",
    "widen": "npp",
    "route": "nnnfppppp",
    "rotate": "nnnnpnppfp",
    "rotate_normed": "nnnnnpnppfppp",
    "rotate_backward": "nnnnpnppfpp",
    "rms_norm": "nnppfpp",
    "rms_norm_backward": "nnnpppppp",
    "attention_forward": "sssspp",
    "attention_backward": "sssssspppp",
    "lay_panels": "nnpp",
    "lay_quantized": "nnnnppp",
    "lay_halves": "nnnnppp",
    "product": "npsp",
    "experts": "sppppp",
    "paged_attention": "ssssppp",
}
