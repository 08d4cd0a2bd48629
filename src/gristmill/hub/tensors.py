"""Named tensors in safetensors files, one file or several with an index, and a model put together from them."""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gristmill.errors import Failure, InputError
from gristmill.model import ModelConfig, Transformer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time, so that a model larger than memory passes through.

    Raises InputError when `folder` has no safetensors, Failure when a file is damaged.
    """
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()  # it is no mapping: it cannot be iterated itself
                for name in names:
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as problem:
            raise Failure(f"{file} cannot be read: {problem}; fetch or build it again") from None


def weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        try:
            names = {str(name) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Failure(f"{folder / INDEX} is damaged: it has no weight_map") from None
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{folder / INDEX} names {name!r}; weights must be .safetensors files beside it")
        return [folder / name for name in sorted(names)]
    pickles = [file.name for file in sorted(folder.glob("*")) if file.suffix in PICKLES]
    if pickles:
        raise InputError(
            f"{folder} has its weights as pickles ({pickles[0]}), which can run code when they are opened; "
            "only safetensors are read: convert them where you trust their origin"
        )
    raise InputError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file. Raises OSError, as any other file would, where the disk is full."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    except SafetensorError as problem:
        if os.strerror(errno.ENOSPC) in str(problem):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None
        raise


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """One file if all fits in `max_shard_bytes`, else numbered files and an index. A larger tensor is a file alone."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        save_tensors(folder / f"{len(shards)}.partial", shard)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            close()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    close()
    if len(shards) == 1:
        (folder / "0.partial").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.partial").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def assemble(
    cfg: ModelConfig, tensors: Iterable[tuple[str, Tensor]], compute_dtype: torch.dtype = torch.float32
) -> Transformer:
    """A model for inference (eval mode, no gradients) from our own tensor names.

    Weights are stored in `compute_dtype`, as the layers would cast them at each use; routers stay fp32, in which
    they compute. Raises InputError when names or shapes are not those of `cfg`.
    """
    with torch.device("meta"):
        model = Transformer(cfg, compute_dtype)
    expected = {name: parameter.shape for name, parameter in model.state_dict().items()}
    state = {}
    for name, tensor in tensors:
        if name not in expected:
            raise InputError(f"the weights hold {name!r}, which a model of this configuration does not have")
        if tensor.shape != expected[name]:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; the configuration says {tuple(expected[name])}")
        state[name] = tensor.to(torch.float32 if ".router." in name else compute_dtype)
    if missing := sorted(expected.keys() - state.keys()):
        raise InputError(f"the weights lack {missing[0]!r} and {len(missing) - 1} more that the configuration asks for")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
