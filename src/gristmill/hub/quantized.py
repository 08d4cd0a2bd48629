"""Quantized matrices in a Hugging Face directory, as the package compressed-tensors stores them ("pack-quantized").

A published matrix NAME of N outputs and K inputs stands there as

    NAME_packed   int32 [N, K * bits / 32]   codes + 2^(bits-1), from the lowest bits of each word up
    NAME_scale    bfloat16 [N, K / group]    number = code * scale
    NAME_shape    int64 [2]                  N, K

That is its own form for the matrices that `qwen3_moe` publishes. `dbrx` publishes its experts stacked, for which it has
none: the same three tensors, of the experts' rows one expert after the other, and w2 transposed, so that its rows
hold inputs as all others do: [E * D, F].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.hub.layouts import LAYOUTS
from gristmill.hub.mapping import TensorMap, from_published, shapes, to_published
from gristmill.hub.settings import describe, require
from gristmill.hub.tensors import Weight, Weights
from gristmill.kernels.quantized import GROUPS, WIDTHS, Quantized, quantize
from gristmill.model import ModelConfig

STORAGE = "pack-quantized"  # what compressed-tensors calls the form above
BITS = tuple(width.bits for width in WIDTHS)
HEAD_BITS = 8
BLOCK_NUMBERS = 1 << 18  # quantized at a time: what the search for scales needs stays in the cache, 15 times as fast
FOREIGN = ("_zero_point", "_g_idx", "_global_scale")  # what other ways to quantize store beside them


@dataclass(frozen=True)
class QuantizedWeight(Weight):
    """A matrix, or a stack of them, that is stored as codes. `load` gives the numbers that they stand for, in fp32.

    codes: reads matrices of the stack from one number to another, [n, N, K]; a single matrix is a stack of one.
    stored_bytes: of the codes, scales and shapes.
    """

    codes: Callable[[int, int], Quantized] = field(kw_only=True)
    stacked: bool = field(kw_only=True)
    bits: int = field(kw_only=True)
    stored_bytes: int = field(kw_only=True)

    @property
    def stored(self) -> tuple[str, int]:
        return f"{self.bits}-bit codes and scales", self.stored_bytes

    def quantized(self) -> Quantized:
        """All of it, K being the inputs: Wqkv [N, K]; w1 and v1 [E, F, D] as they are; w2 [E, F, D] as [E, D, F]."""
        whole = self.codes(0, self.shape[0] if self.stacked else 1)
        return whole if self.stacked else Quantized(whole.words[0], whole.scales[0], whole.bits)

    def expert(self, number: int) -> Quantized:
        one = self.codes(number, number + 1)
        return Quantized(one.words[0], one.scales[0], one.bits)


@dataclass(frozen=True)
class Packed:
    """One published matrix of codes, [N, K]."""

    packed: Weight
    scale: Weight
    bits: int
    group: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + 16  # the shape: two int64

    def read(self, start: int, stop: int) -> Quantized:
        return Quantized(self.packed.read(start, stop), self.scale.read(start, stop), self.bits)


def is_transposed(name: str) -> bool:
    """Of our tensors, those that hold a matrix's outputs last: w2 multiplies as it is."""
    return name.endswith("experts.w2")


# ---- reading -------------------------------------------------------------------------------------------


def read_settings(config: Mapping[str, Any]) -> set[tuple[int, int]]:
    """(bits, group) of each kind of matrix that a quantized model's `config.json` names.

    Raises InputError when it tells of another way to quantize than the one above.
    """
    settings = config["quantization_config"]
    kinds = set()
    with describe("quantized"):
        require(settings, "quant_method", "compressed-tensors")
        require(settings, "format", STORAGE)
        require(settings, "quantization_status", "compressed")
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            require({key: settings.get(key) or None}, key, None)
        for group in settings["config_groups"].values():
            require(group, "format", STORAGE)
            for key in ("input_activations", "output_activations"):
                require(group, key, None)
            weights = group["weights"]
            wanted = {"type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
            for key, value in wanted.items():
                require(weights, key, value)
            if weights.get("actorder") not in (None, False, "weight", "static"):
                raise InputError(f"config.json says actorder={weights['actorder']!r}; groups must be of neighbours")
            kinds.add((weights["num_bits"], weights.get("group_size")))
            if weights["num_bits"] not in BITS or weights.get("group_size") not in GROUPS:
                raise InputError(
                    f"config.json says num_bits={weights['num_bits']} and group_size={weights.get('group_size')}; "
                    f"quantized matrices are read with {' or '.join(map(str, BITS))} bits and groups of "
                    f"{', '.join(map(str, GROUPS))}"
                )
    return kinds


def from_quantized(cfg: ModelConfig, table: TensorMap, published: Weights, kinds: set[tuple[int, int]]) -> Weights:
    """`from_published`, where matrices may be codes, of one of the `kinds`: those become a `QuantizedWeight`.

    Raises InputError when a part of one is missing, of another shape or of another dtype.
    """
    if foreign := [name for name in published if name.endswith(FOREIGN)]:
        raise InputError(f"the weights hold {foreign[0]!r}; only symmetric codes with a scale a group are read")
    plain = dict(published)
    quantized: dict[str, Weight] = {}
    for name, shape in shapes(cfg).items():
        pieces = table[name]
        if any(piece.name + "_packed" in published for piece in pieces):
            inputs = shape[1] if is_transposed(name) else shape[-1]
            parts = []
            for piece in pieces:
                rows = torch.Size(piece.shape).numel() // inputs
                parts.append(_take(piece.name, (rows, inputs), plain, kinds))
                plain[piece.name] = Weight(piece.shape, torch.float32, partial(_no_tensor, piece.name))
            quantized[name] = _together(name, shape, parts)
    ours = from_published(cfg, table, plain)
    for name, weight in plain.items():
        if not weight.dtype.is_floating_point:
            raise InputError(f"{name} is stored as {weight.dtype}, which only codes of quantized matrices are")
    return {name: quantized.get(name, weight) for name, weight in ours.items()}


def _take(name: str, shape: tuple[int, int], weights: dict[str, Weight], kinds: set[tuple[int, int]]) -> Packed:
    """Removes a matrix's tensors from the `weights`. Raises InputError when they are not what they should be."""
    for part in ("_packed", "_scale", "_shape"):
        if name + part not in weights:
            raise InputError(f"the weights lack {name + part!r}; the rest of this quantized matrix is there")
    words, scale, its_shape = (weights.pop(name + part) for part in ("_packed", "_scale", "_shape"))
    if scale.dtype != torch.bfloat16:
        raise InputError(f"{name}_scale is stored as {scale.dtype}; scales are read from bfloat16")
    if (words.dtype, its_shape.dtype, its_shape.shape) != (torch.int32, torch.int64, (2,)):
        raise InputError(f"{name}_packed and {name}_shape must be int32 [N, words] and int64 [2]")
    if (said := tuple(its_shape.load().tolist())) != shape:
        raise InputError(f"{name}_shape says {said}; the configuration says {shape}")
    rows, inputs = shape
    for bits, group in kinds:
        if inputs % group == 0 and (words.shape, scale.shape) == ((rows, inputs * bits // 32), (rows, inputs // group)):
            return Packed(words, scale, bits, group)
    raise InputError(
        f"{name}_packed and {name}_scale have shapes {words.shape} and {scale.shape}: those of a matrix {shape} with "
        "none of the num_bits and group_size that config.json gives"
    )


def _together(name: str, shape: tuple[int, ...], parts: Sequence[Packed]) -> QuantizedWeight:
    """Matrices of one published tensor, or of one tensor each, or (Wqkv) one of the rows of several."""
    if len({(part.bits, part.group) for part in parts}) > 1:
        raise InputError(f"the parts of {name} are quantized in several ways; they must share bits and group size")
    stack, bits = (shape[0] if len(shape) == 3 else 1), parts[0].bits

    def read_codes(start: int, stop: int) -> Quantized:
        if len(parts) == stack:
            read = [part.read(0, part.packed.shape[0]) for part in parts[start:stop]]
        elif len(parts) == 1:
            rows = parts[0].packed.shape[0] // stack
            read = [parts[0].read(start * rows, stop * rows)]
        else:
            read = [part.read(0, part.packed.shape[0]) for part in parts]
        n = stop - start
        words, scales = torch.cat([part.words for part in read]), torch.cat([part.scales for part in read])
        return Quantized(words.view(n, -1, words.shape[-1]), scales.view(n, -1, scales.shape[-1]), bits)

    def rows(start: int, stop: int) -> Tensor:
        """Of our tensor's first dimension: whole matrices, where it is a stack."""
        if len(shape) < 3:
            return load()[start:stop]
        dense = read_codes(start, stop).dense()
        return dense.mT.contiguous() if is_transposed(name) else dense

    def load() -> Tensor:
        return rows(0, shape[0]) if len(shape) == 3 else read_codes(0, 1).dense()[0]

    return QuantizedWeight(
        shape,
        torch.float32,
        load,
        rows,
        codes=read_codes,
        stacked=len(shape) == 3,
        bits=bits,
        stored_bytes=sum(part.nbytes for part in parts),
    )


def _no_tensor(name: str) -> Tensor:
    raise AssertionError(f"{name} is read from its codes")


# ---- writing -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """`bits` of attention's and the experts' matrices, `group` inputs that share a scale.

    An output matrix of its own gets 8 bits whatever the others have. Embeddings, norms and routers stay as they are.
    """

    bits: int = 8
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group not in GROUPS:
            raise InputError(f"bits={self.bits} must be one of {BITS}, group={self.group} one of {GROUPS}")

    def bits_of(self, cfg: ModelConfig) -> dict[str, int]:
        """Our name of each matrix that is quantized -> its bits. Raises InputError when the groups do not fit one."""
        found = {}
        for name, shape in shapes(cfg).items():
            if name == "lm_head.weight":
                found[name] = HEAD_BITS
            elif ".attn.Wqkv." in name or ".attn.out_proj." in name or ".experts." in name:
                found[name] = self.bits
            inputs = shape[1] if is_transposed(name) else shape[-1]
            if name in found and inputs % self.group:
                fitting = [group for group in GROUPS if inputs % group == 0]
                raise InputError(
                    f"group={self.group} must divide the {inputs} inputs of {name}; "
                    + (f"{', '.join(map(str, fitting))} would" if fitting else f"none of {GROUPS} does")
                )
        return found

    def num_bytes(self, cfg: ModelConfig, weights: Weights) -> int:
        """Of the model's tensors when it is quantized, but for the shapes beside the codes."""
        bits, total = self.bits_of(cfg), 0.0
        for name, weight in weights.items():
            count = torch.Size(weight.shape).numel()
            if name in bits:
                total += count * (bits[name] / 8 + 2 / self.group)
            else:
                total += min(count * 2, weight.nbytes) if name == "wte.weight" else weight.nbytes
        return int(total)

    def to_json(self, cfg: ModelConfig) -> dict[str, Any]:
        """`quantization_config`, in the form of compressed-tensors."""
        routers = sorted(f"re:.*{layout.router}$" for layout in LAYOUTS)
        groups = {"group_0": self._group(["Linear"], self.bits)}
        if not cfg.tie_word_embeddings:  # named, or SGLang would take it for a plain one
            groups["group_1"] = self._group(["re:.*lm_head$"], HEAD_BITS)
        return {
            "quant_method": "compressed-tensors",
            "format": STORAGE,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": routers + ["lm_head"] * cfg.tie_word_embeddings,
            "kv_cache_scheme": None,
        }

    def _group(self, targets: list[str], bits: int) -> dict[str, Any]:
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
        }
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def to_quantized(cfg: ModelConfig, table: TensorMap, ours: Weights, how: QuantizeConfig) -> Weights:
    """`to_published`, with matrices as codes, made when they are read. In order, each of ours is read once.

    Embeddings wider than bfloat16 become that.
    """
    bits = how.bits_of(cfg)
    dense = to_published(table, ours)
    published: dict[str, Weight] = {}
    for name, shape in shapes(cfg).items():
        for piece in table[name]:
            weight = dense[piece.name]
            if name not in bits:
                narrow = name == "wte.weight" and weight.dtype.itemsize > 2
                published[piece.name] = weight.to(torch.bfloat16) if narrow else weight
                continue
            inputs = shape[1] if is_transposed(name) else shape[-1]
            as_rows = is_transposed(name) and not piece.transposed
            rows = torch.Size(piece.shape).numel() // inputs
            packing = Packing(weight.load, shape if as_rows else None, (rows, inputs), bits[name], how.group)
            published |= {piece.name + part: stored for part, stored in packing.weights().items()}
    return published


class Packing:
    """Quantizes a published matrix when its words are asked for, and keeps the scales until they are: files hold words
    first.

    stack: the shape of our tensor, where its matrices are to be transposed.
    """

    def __init__(
        self,
        load: Callable[[], Tensor],
        stack: tuple[int, ...] | None,
        shape: tuple[int, int],
        bits: int,
        group: int,
    ) -> None:
        self.load, self.stack, self.shape, self.bits, self.group = load, stack, shape, bits, group
        self.scales: Tensor | None = None

    def weights(self) -> dict[str, Weight]:
        rows, inputs = self.shape
        return {
            "_packed": Weight((rows, inputs * self.bits // 32), torch.int32, self.words),
            "_scale": Weight((rows, inputs // self.group), torch.bfloat16, self.take_scales),
            "_shape": Weight.of(torch.tensor(self.shape)),
        }

    def words(self) -> Tensor:
        rows, inputs = self.shape
        dense = self.load()
        if self.stack is not None:
            dense = dense.view(self.stack).mT.reshape(rows, inputs)
        words, scales = [], []
        for block in dense.split(max(1, BLOCK_NUMBERS // inputs)):  # what quantizing needs beside it stays small
            quantized = quantize(block, self.bits, self.group)
            words.append(quantized.words)
            scales.append(quantized.scales)
        self.scales = torch.cat(scales)
        return torch.cat(words)

    def take_scales(self) -> Tensor:
        if self.scales is None:
            self.words()
        scales, self.scales = self.scales, None
        assert scales is not None
        return scales
