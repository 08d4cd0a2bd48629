"""The fast paths on CUDA: what the kernels beside this folder call when their tensors lie there.

Triton is an optional part, imported in triton_kernels.py alone and on first use; importing this package needs torch
alone. Each function has the signature and the mathematics of its namesake in `gristmill.kernels`, for bf16 and, for
checks, fp32. Nothing here waits for the device, except where attention.py says so. None of it has run on a GPU: it
was checked in Triton's interpreter, and its block sizes were never tuned.
"""
