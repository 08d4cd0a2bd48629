"""Named weights: known by shape and dtype first, read one at a time, written one at a time.

A model larger than memory passes through: what is read is one tensor or a part of it, and a written one is not kept.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gristmill.errors import Failure, InputError
from gristmill.hub.settings import read_json
from gristmill.kernels.quantized import Quantized
from gristmill.model import ModelConfig, Transformer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHUNK = re.compile(r"(.+)@(\d+(?:,\d+)*)")  # the key of a tensor's part: its name and where the part begins
MAX_SHARD_BYTES = 5 * 10**9
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # weights' own
PACKED = {"I32": torch.int32, "I64": torch.int64}  # of quantized ones: their codes, and their shapes
LFS_POINTER = b"version https://git-lfs"
NAMED = 3  # so many offenders stand in a message


@dataclass(frozen=True)
class Weight:
    """A tensor that is not in memory yet; `load` reads or makes it.

    rows: reads those from one number to another of the first dimension, and no more; None where that cannot be done.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    rows: Callable[[int, int], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> "Weight":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, lambda start, stop: tensor[start:stop])

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def stored(self) -> tuple[str, int]:
        """The form in which it is stored, and its bytes."""
        return str(self.dtype).removeprefix("torch."), self.nbytes

    def to(self, dtype: torch.dtype) -> "Weight":
        """Raises InputError, when it is loaded, for values that a narrower type cannot hold."""
        if dtype == self.dtype:
            return self
        return Weight(
            self.shape,
            dtype,
            lambda: _cast(self.load(), dtype),
            lambda start, stop: _cast(self.read(start, stop), dtype),
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Those rows of the first dimension; only their bytes are read where the file allows it."""
        return self.load()[start:stop] if self.rows is None else self.rows(start, stop)

    def expert(self, number: int) -> Tensor | Quantized:
        """One of the matrices that are stacked in it; only its bytes are read where the file allows it.

        A quantized one comes as its codes, [N, K]: K are its inputs, so that of w2 is the transposed one.
        """
        return self.read(number, number + 1)[0]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if dtype in (torch.float16, torch.bfloat16) and cast.numel() and not all(map(torch.isfinite, torch.aminmax(cast))):
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"the model holds values that {name} cannot; give a wider --dtype, or leave it out")
    return cast


Weights: TypeAlias = Mapping[str, Weight]


@dataclass(frozen=True)
class Chunk:
    """A stored tensor, or the part of one that begins at `offsets`. `read` takes a slice for each dimension."""

    offsets: tuple[int, ...]
    weight: Weight
    read: Callable[[tuple[slice, ...]], Tensor]

    @property
    def place(self) -> tuple[slice, ...]:
        """Where it belongs in the whole."""
        return tuple(slice(start, start + n) for start, n in zip(self.offsets, self.weight.shape, strict=True))


def in_memory(tensors: Mapping[str, Tensor]) -> Weights:
    return {name: Weight.of(tensor) for name, tensor in tensors.items()}


# ---- reading -------------------------------------------------------------------------------------------


def open_weights(folder: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> Weights:
    """Everything in the folder's safetensors files; only their headers are read now. `dtypes`: what may stand there.

    Raises InputError when `folder` has no safetensors, Failure when a file is damaged.
    """
    return {name: whole(chunks) for name, chunks in open_chunks(folder, dtypes=dtypes).items()}


def open_chunks(
    folder: Path, stem: str = "model", dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, list[Chunk]]:
    """Each tensor's parts, which together make it whole: one, unless several ranks hold it. Raises as above.

    stem: what the files' names begin with.
    """
    stored: dict[str, list[Chunk]] = {}
    keys: set[str] = set()
    for file in weight_files(folder, stem):
        try:
            for key, weight, read in _open_file(file, dtypes):
                if key in keys:
                    raise Failure(f"{file} holds {key!r}, and so does another file beside it; remove the stray one")
                keys.add(key)
                part = CHUNK.fullmatch(key)
                offsets = tuple(map(int, part[2].split(","))) if part else (0,) * len(weight.shape)
                stored.setdefault(part[1] if part else key, []).append(Chunk(offsets, weight, read))
        except (SafetensorError, OSError) as problem:
            raise Failure(f"{file} cannot be read: {_why(file, problem)}; fetch or build it again") from None
    for name, chunks in stored.items():
        if sum(chunk.weight.nbytes for chunk in chunks) != whole(chunks).nbytes:
            raise Failure(f"{folder} holds {name!r} in part only; fetch or build it again")
    return stored


def whole(chunks: list[Chunk]) -> Weight:
    """The tensor that these parts make together."""
    if len(chunks) == 1 and not any(chunks[0].offsets):
        return chunks[0].weight
    shape = tuple(max(side.stop for side in sides) for sides in zip(*(chunk.place for chunk in chunks), strict=True))
    rows = partial(_assembled, shape, chunks)
    return Weight(shape, chunks[0].weight.dtype, partial(rows, 0, shape[0]), rows)


def _assembled(shape: tuple[int, ...], chunks: list[Chunk], start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the first dimension."""
    part = torch.empty(stop - start, *shape[1:], dtype=chunks[0].weight.dtype)
    for chunk in chunks:
        first, *others = chunk.place
        lower, upper = max(first.start, start), min(first.stop, stop)
        if lower < upper:
            inside = slice(lower - first.start, upper - first.start)
            part[(slice(lower - start, upper - start), *others)] = chunk.read((inside, *(slice(None) for _ in others)))
    return part


def _open_file(
    file: Path, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Weight, Callable[[tuple[slice, ...]], Tensor]]]:
    safe_open(file, framework="np")  # raises where the header is not what the format asks for
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(start - 8))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in dtypes:
            raise InputError(
                f"{file}: {name} is stored as {entry['dtype']}; weights are read from {', '.join(DTYPES)}: "
                "quantized ones must be converted first"
            )
        stored = Stored(file, start + entry["data_offsets"][0], tuple(entry["shape"]), dtypes[entry["dtype"]])
        yield name, Weight(stored.shape, stored.dtype, stored.load, stored.rows), stored.part


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, from byte `start` on. It is read, not mapped: what is in memory is what was asked for."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> Tensor:
        return self._read(0, self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        row = torch.Size(self.shape[1:]).numel()
        return self._read(start * row, (stop - start, *self.shape[1:]))

    def part(self, place: tuple[slice, ...]) -> Tensor:
        if not place:
            return self.load()
        start, stop, _step = place[0].indices(self.shape[0])
        return self.rows(start, stop)[(slice(None), *place[1:])]

    def _read(self, element: int, shape: tuple[int, ...]) -> Tensor:
        made = torch.empty(shape, dtype=self.dtype)
        room = made.view(-1).view(torch.uint8).numpy().data if made.numel() else memoryview(b"")
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self.start + element * self.dtype.itemsize)
            while room:
                if not (count := opened.readinto(room)):
                    raise Failure(f"{self.file} has become shorter since it was opened; fetch or build it again")
                room = room[count:]
        return made


def _why(file: Path, problem: Exception) -> str:
    if not file.exists():
        return "it is named in the index and is not there"
    if isinstance(problem, OSError):
        return problem.strerror or str(problem)
    with file.open("rb") as start:
        is_pointer = start.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        return "it is a Git LFS pointer, not the weights themselves (`git lfs pull` fetches them)"
    return str(problem)


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The files that hold a folder's weights: one, or those that its index names."""
    single, index = folder / shard_name(stem, 0, 1), folder / index_name(stem)
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = (read_json(index) or {}).get("weight_map")
        if not isinstance(weight_map, dict):
            raise Failure(f"{index} is damaged: it has no weight_map; fetch or build it again")
        names = {str(name) for name in weight_map.values()}
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{index} names {name!r}; weights must be .safetensors files beside it")
        return [folder / name for name in sorted(names)]
    pickles = [file.name for file in sorted(folder.glob("*")) if file.suffix in PICKLES]
    if pickles:
        raise InputError(
            f"{folder} has its weights as pickles ({pickles[0]}), which can run code when they are opened; "
            "only safetensors are read: convert them where you trust their origin"
        )
    raise InputError(f"{folder} holds no weights: neither {single.name} nor {index.name}")


# ---- writing -------------------------------------------------------------------------------------------


def write_weights(
    folder: Path,
    weights: Weights,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[float], None] = lambda num_bytes: None,
) -> None:
    """One file if all fits in `max_shard_bytes`, else numbered files and an index. A larger tensor is a file alone.

    One tensor is in memory at a time; `advance` is told the bytes of each piece when it is written.
    """
    shards = plan_shards(weights, max_shard_bytes)
    files = {shard_name("model", number, len(shards)): names for number, names in enumerate(shards)}
    for file, names in files.items():
        with (folder / file).open("wb") as out:
            for piece in serialized({name: weights[name] for name in names}):
                out.write(piece)
                advance(len(piece))
    if len(files) > 1:
        write_index(folder, "model", files, sum(weight.nbytes for weight in weights.values()))


def plan_shards(weights: Weights, max_shard_bytes: int) -> list[list[str]]:
    """The names that go into each file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.nbytes
    return shards


def shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def write_index(folder: Path, stem: str, files: Mapping[str, Iterable[str]], num_bytes: int) -> None:
    """`files`: the keys in each. `num_bytes`: of all tensors."""
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / index_name(stem)).write_text(json.dumps(index, indent=2) + "\n")


def serialized(weights: Weights) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: the header's length in 8 bytes and the header in JSON, then each tensor.

    The package's own writer wants every tensor of a file in memory; this one wants one of them.
    """
    codes = {dtype: code for code, dtype in (DTYPES | PACKED).items()}
    ordered = sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize)  # each aligned to its own size
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in ordered:
        start, end = end, end + weight.nbytes
        header[name] = {"dtype": codes[weight.dtype], "shape": weight.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, weight in ordered:
        tensor = weight.load().detach().cpu().contiguous()
        assert (tuple(tensor.shape), tensor.dtype) == (weight.shape, weight.dtype), name
        yield tensor.view(-1).view(torch.uint8).numpy().data


# ---- into a model --------------------------------------------------------------------------------------


def assemble(cfg: ModelConfig, weights: Weights, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """A model for inference (eval mode, no gradients) from our own names.

    Weights are stored in `compute_dtype`, as the layers would cast them at each use; routers and their biases in at
    least fp32, in which they compute. Raises InputError when names or shapes are not those of `cfg`.
    """
    with torch.device("meta"):
        model = Transformer(cfg, compute_dtype)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    check_names(expected, weights)
    routers = torch.promote_types(compute_dtype, torch.float32)
    state = {
        name: weight.load().to(routers if ".router" in name else compute_dtype) for name, weight in weights.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def check_names(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> None:
    """Raises InputError that names what is too much, what is missing or what has another shape."""
    if unknown := [name for name in weights if name not in expected]:
        raise InputError(f"the weights hold {_some(unknown)}, which a model of this configuration does not have")
    if missing := [name for name in expected if name not in weights]:
        raise InputError(f"the weights lack {_some(missing)}, which the configuration asks for")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise InputError(f"{name} has shape {weights[name].shape}; the configuration says {shape}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + more
