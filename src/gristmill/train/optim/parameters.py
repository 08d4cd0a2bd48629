"""A model's parameters by name, as an optimizer updates them: each rank updates the part that it stores."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gristmill.model import Transformer
from gristmill.parallel.mesh import local


class Parameters:
    """The parameters of a model.

    whole: The model's own parameters.
    parts: The parts that this rank stores, as parameters that share their memory; an unsplit one is its own part.
    matrices: The names of the hidden matrices, see `hidden_matrices`.
    """

    def __init__(self, model: Transformer) -> None:
        self.whole = dict(model.named_parameters())
        self.parts = {name: _part(param) for name, param in self.whole.items()}
        self.matrices = hidden_matrices(model)
        self.is_split = any(part is not self.whole[name] for name, part in self.parts.items())
        self.compute_dtype = model.compute_dtype


def _part(param: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(local(param.detach())) if isinstance(param, DTensor) else param


def hidden_matrices(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Return the parameters that consist of hidden matrices: name -> row counts of its matrices; () for a stack."""
    cfg = model.cfg
    kv_width = cfg.kv_n_heads * cfg.head_dim
    rows: dict[str, tuple[int, ...]] = {}
    for name, param in model.named_parameters():
        match name.split(".")[-2:]:
            case ["Wqkv", "weight"]:
                rows[name] = (cfg.n_heads * cfg.head_dim, kv_width, kv_width)
            case ["out_proj", "weight"] | ["ffn", "w1" | "v1" | "w2"]:
                rows[name] = (param.shape[0],)
            case ["experts", _]:
                rows[name] = ()
    return rows


def split_matrices(tensor: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    """Return views of the matrices that a tensor consists of."""
    return list(tensor.split(rows) if rows else tensor.unbind())
