"""Several ranks write one checkpoint, each tensor once; any number of ranks goes on from it, from wholes or parts."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Processes
from safetensors.torch import load_file
from test_checkpoint import (
    Tensors,
    assert_every_damage_is_named,
    in_folder,
    is_of,
    same,
    saved,
    steps_in,
    tensors_of,
    zeros,
)
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gristmill import artifact
from gristmill.errors import Failure
from gristmill.hub.tensors import open_weights
from gristmill.parallel.ranks import Ranks
from gristmill.train import checkpoint as module
from gristmill.train import storage
from gristmill.train.checkpoint import Saved, SaveFailed, State, checkpoint_path, load_tensors


def save_on_ranks(ranks: Ranks, folder: Path, *steps: int) -> list[Saved | SaveFailed]:
    return saved(in_folder(folder, ranks=ranks), *steps)


def test_two_ranks_write_each_tensor_once_and_the_same_bytes_each_time(two: Processes, tmp_path: Path) -> None:
    for name in ("a", "b"):
        on_0, on_1 = two.run(save_on_ranks, tmp_path / name, 1, 2)
        assert [type(event) for event in on_0] == [Saved, Saved]
        assert on_1 == []
    path = checkpoint_path(tmp_path / "a", 2)
    assert is_of(path, 2)  # on one rank
    assert {file.name for file in path.iterdir()} == {
        *(f"{stem}-0000{rank}-of-00002.safetensors" for stem in ("model", "optimizer") for rank in (1, 2)),
        *("model.safetensors.index.json", "optimizer.safetensors.index.json"),
        *("model.json", "state.json", "manifest.json", "tokenizer"),
    }
    for stem, tensors in zip(("model", "optimizer"), tensors_of(2), strict=True):
        files = [load_file(path / f"{stem}-0000{rank}-of-00002.safetensors") for rank in (1, 2)]
        assert files[0].keys() & files[1].keys() == set()
        assert same(files[0] | files[1], tensors)
        sizes = [sum(tensor.nbytes for tensor in file.values()) for file in files]
        assert max(sizes) <= 1.5 * min(sizes)
        index = json.loads((path / f"{stem}.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(sizes)
    assert same({name: weight.load() for name, weight in open_weights(path).items()}, tensors_of(2)[0])
    assert artifact.verify(path).not_covered == []
    assert artifact.load(path).content == artifact.load(checkpoint_path(tmp_path / "b", 2)).content
    assert_every_damage_is_named(tmp_path / "a", path, older=1)


def sharded(ranks: Ranks, tensors: Tensors) -> Tensors:
    """Each rank holds its part: even, uneven, of nothing, by columns, and replicated."""
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    placed = {"even": Shard(0), "uneven": Shard(0), "single": Shard(0), "columns": Shard(1), "whole": Replicate()}
    return {
        name: distribute_tensor(tensor, mesh, [placed[name.split("/")[-1]]])  # type: ignore[dict-item]
        if name.split("/")[-1] in placed
        else tensor
        for name, tensor in tensors.items()
    }


def sharded_tensors() -> tuple[Tensors, Tensors]:
    shapes = {"even": (4, 3), "uneven": (5, 3), "single": (1, 2), "columns": (3, 4), "whole": (2, 2), "plain": (6,)}
    chance = torch.Generator().manual_seed(0)
    model = {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    return model, {f"exp_avg/{name}": tensor + 1 for name, tensor in model.items()}


def save_parts(ranks: Ranks, folder: Path) -> None:
    model, optimizer = sharded_tensors()
    checkpoints = in_folder(folder, ranks=ranks)
    checkpoints.save(State(1, {}, {}), sharded(ranks, model), sharded(ranks, optimizer), {})
    assert all(isinstance(event, Saved) for event in checkpoints.wait())


def load_parts(ranks: Ranks, path: Path) -> bool:
    """Does each rank have the parts that it should?"""
    wanted = [sharded(ranks, tensors) for tensors in sharded_tensors()]
    found = [{name: torch.zeros_like(tensor) for name, tensor in group.items()} for group in wanted]
    load_tensors(path, *found)
    return all(same(local(group), local(right)) for group, right in zip(found, wanted, strict=True))


def local(tensors: Tensors) -> Tensors:
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def test_what_two_ranks_hold_in_parts_is_whole_on_one_and_in_parts_again_on_two(two: Processes, tmp_path: Path) -> None:
    two.run(save_parts, tmp_path / "two")
    path = checkpoint_path(tmp_path / "two", 1)
    keys = {key for file in path.glob("model-*") for key in load_file(file)}
    parts = {"even@0,0", "even@2,0", "uneven@0,0", "uneven@3,0", "single", "columns@0,0", "columns@0,2"}
    assert keys == parts | {"whole", "plain"}
    groups = [zeros(tensors) for tensors in sharded_tensors()]
    load_tensors(path, *groups)
    assert all(map(same, groups, sharded_tensors()))
    assert same({name: weight.load() for name, weight in open_weights(path).items()}, groups[0])

    one = in_folder(tmp_path / "one")
    one.save(State(1, {}, {}), *groups, {})
    assert isinstance(one.wait()[0], Saved)
    for folder in ("one", "two"):
        assert two.run(load_parts, checkpoint_path(tmp_path / folder, 1)) == [True, True]


def test_a_part_that_is_missing_is_not_taken_for_a_smaller_tensor(two: Processes, tmp_path: Path) -> None:
    two.run(save_parts, tmp_path)
    path = checkpoint_path(tmp_path, 1)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        key: file for key, file in index["weight_map"].items() if file == "model-00002-of-00002.safetensors"
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Failure, match="in part only"):
        open_weights(path)


def fail_on_rank_1(ranks: Ranks, folder: Path) -> list[Saved | SaveFailed]:
    def full(file: Path, tensors: Tensors) -> dict[str, Any]:
        if ranks.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return storage.write_verified(file, tensors)

    module.write_verified = full
    try:
        return saved(in_folder(folder, ranks=ranks), 1)
    finally:
        module.write_verified = storage.write_verified


def test_what_failed_on_another_rank_is_reported_with_its_number(two: Processes, tmp_path: Path) -> None:
    (event,), on_1 = two.run(fail_on_rank_1, tmp_path)
    assert on_1 == []
    assert isinstance(event, SaveFailed)
    assert event.reason.startswith("rank 1: ")
    assert "free some room" in event.reason
    assert steps_in(tmp_path) == []
    (again,), _ = two.run(save_on_ranks, tmp_path, 2)
    assert isinstance(again, Saved)


class Alone(Ranks):
    """Rank 0 of two, the other of which takes part in the plan and then dies."""

    def gather(self, obj: Any) -> list[Any]:
        return [obj, obj]

    def scatter(self, objs: list[Any] | None) -> Any:
        assert objs is not None
        return objs[0]


def test_a_rank_that_is_not_heard_of_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTS_TIMEOUT_S", 0.0)
    (event,) = saved(in_folder(tmp_path, ranks=Alone(0, 2, HashStore())), 1)
    assert isinstance(event, SaveFailed)
    assert "lacks what rank 1 had to write within 0 s; every rank must see the same folder" in event.reason
    assert steps_in(tmp_path) == []
