"""The tensors of a checkpoint on disk: torch's distributed checkpoint plans them, safetensors stores them.

Its planner decides which rank writes which tensor, or part of one, and from where a rank reads what it needs, however
many ranks there are then. Its storage is not used: that keeps the plan in a pickle, which can run code when it is read.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from gristmill.artifact import sha256_file
from gristmill.errors import Failure
from gristmill.hub.tensors import (
    Chunk,
    Weight,
    check_names,
    in_memory,
    open_chunks,
    serialized,
    shard_name,
    whole,
    write_index,
)
from gristmill.parallel.ranks import Ranks

# ---- writing -------------------------------------------------------------------------------------------


class FilePlan:
    """Which of a group's tensors, or parts of them, this rank writes; rank 0 knows what all of them write.

    stem: what the files' names begin with. It depends on the tensors' names, shapes and placement alone, so it is made
    once, by all ranks together, and then tells for each checkpoint what to copy.
    """

    def __init__(self, stem: str, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
        self.stem = stem
        self.file = shard_name(stem, ranks.rank, ranks.world_size)
        self._shapes = _shapes(tensors)
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._planner.set_up_planner(dict(tensors), is_coordinator=ranks.rank == 0)
        gathered = ranks.gather(self._planner.create_local_plan())
        plans = None if gathered is None else self._planner.create_global_plan(gathered)[0]
        self._items = _items(self._planner.finish_plan(ranks.scatter(plans)))
        everyones = [_items(plan) for plan in plans or []]
        self.files = {shard_name(stem, rank, len(everyones)): list(items) for rank, items in enumerate(everyones)}
        self.num_bytes = sum(_num_bytes(item) for items in everyones for item in items.values())

    def copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Key -> the values of now, in CPU memory. Those from a GPU have arrived after `torch.cuda.synchronize()`."""
        assert _shapes(tensors) == self._shapes, "a training's tensors keep their names and shapes"
        self._planner.set_up_planner(dict(tensors))
        return {key: _copy(self._planner.resolve_data(item)) for key, item in self._items.items()}

    def write_index(self, folder: Path) -> None:
        """By rank 0: the table of what is in which file, where there is more than one."""
        if len(self.files) > 1:
            write_index(folder, self.stem, self.files, self.num_bytes)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _items(plan: SavePlan) -> dict[str, WriteItem]:
    """By their keys in the file: a tensor's name, and for a part of it where that begins."""
    items = {}
    for item in plan.items:
        assert item.tensor_data is not None, f"{item.index.fqn} is not a tensor"
        chunk = item.tensor_data.chunk
        if chunk.sizes == item.tensor_data.size:
            items[item.index.fqn] = item
        elif chunk.sizes.numel():  # an uneven split leaves some ranks nothing
            items[f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"] = item
    return items


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _copy(tensor: Any) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=True)


def write_verified(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, wait until the disk has it, read it back; returns {"bytes", "sha256"}.

    Raises OSError where it cannot be written, Failure where the disk gives back something else.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with file.open("wb") as out:
        for piece in serialized(in_memory(tensors)):
            out.write(piece)
            digest.update(piece)  # of what was meant: what memory or disk change on the way is found below
            num_bytes += len(piece)
        out.flush()
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):  # so that the bytes come from the disk, not from the page cache
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sha256_file(file) != digest.hexdigest():
        raise Failure(f"{file} reads back other than it was written: the disk or the memory is failing; replace it")
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


# ---- reading -------------------------------------------------------------------------------------------


@torch.no_grad()
def read_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors in place, each rank what it holds, from however many ranks wrote them.

    Raises InputError when names or shapes are not those of the folder, Failure when a file is damaged.
    """
    stored = open_chunks(folder, stem)
    wholes = {name: whole(chunks) for name, chunks in stored.items()}
    check_names({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wholes)
    metadata = Metadata({name: _metadata(weight, stored[name]) for name, weight in wholes.items()})
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata)
    places = {(name, chunk.offsets): chunk for name, chunks in stored.items() for chunk in chunks}
    for item in planner.finish_plan(planner.create_local_plan()).items:
        chunk = places[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
        part = tuple(slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths, strict=True))
        planner.resolve_tensor(item).copy_(chunk.read(part) if part else chunk.weight.load())


def _metadata(weight: Weight, chunks: list[Chunk]) -> TensorStorageMetadata:
    parts = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.weight.shape)) for c in chunks]
    return TensorStorageMetadata(TensorProperties(weight.dtype), torch.Size(weight.shape), parts)
