"""Split tensors become whole on one rank each, and split again: even, uneven, more ranks than rows or tensors."""

import pytest
import torch
from ranks import Processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gristmill.parallel.ranks import Ranks
from gristmill.parallel.wholes import Wholes


def there_and_back(ranks: Ranks, shape: tuple[int, ...], dim: int, count: int) -> tuple[Tensor, list[Tensor], bool]:
    mesh = init_device_mesh("cpu", (ranks.world_size,), mesh_dim_names=("split",))
    tensors = [torch.arange(torch.Size(shape).numel()).view(shape) + 1000 * number for number in range(count)]
    split = [distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None) for tensor in tensors]
    like = split[0]
    assert isinstance(like, DTensor)
    parts = [tensor.to_local() for tensor in split]
    exchange = Wholes(like, parts[0], count)
    wholes = exchange.gathered(parts)
    again = exchange.returned(wholes)
    return wholes, tensors, all(map(torch.equal, again, parts)) and len(again) == len(parts)


@pytest.mark.parametrize(
    ("shape", "dim", "count"), [((8, 3), 0, 4), ((5, 3), 0, 3), ((2, 4), 0, 1), ((2, 8, 3), 1, 7), ((9, 2), 0, 6)]
)
def test_each_tensor_is_whole_on_one_rank_and_comes_back(
    shape: tuple[int, ...], dim: int, count: int, four: Processes
) -> None:
    answers = four.run(there_and_back, shape, dim, count)
    assert all(back for _, _, back in answers)
    assert torch.equal(torch.cat([wholes for wholes, _, _ in answers]), torch.stack(answers[0][1]))
