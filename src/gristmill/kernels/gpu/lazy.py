"""Triton's kernels, imported when a CUDA tensor first needs them."""

from types import ModuleType

import torch
from torch import Tensor

from gristmill.errors import InputError


def kernels_for(x: Tensor) -> ModuleType:
    """The module of Triton kernels. InputError where Triton is absent or x has a dtype that they would round."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise InputError(f"{x.dtype} on {x.device}: the GPU kernels take bfloat16 and float32; set train.dtype to one")
    try:
        from gristmill.kernels.gpu import triton_kernels
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise InputError(
            "training on CUDA needs Triton, which is not installed: `pip install 'gristmill[gpu]'`"
        ) from None
    return triton_kernels
