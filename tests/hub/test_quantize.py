import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gristmill.errors import InputError
from gristmill.hub import in_memory, read_published, write_published
from gristmill.hub.layout import as_one_expert
from gristmill.hub.quantized import QuantizeConfig, QuantizedWeight, pack, unpack
from gristmill.hub.tensors import SINGLE
from gristmill.kernels.quantized import Quantized, quantize
from gristmill.model import Transformer

Tiny = Callable[..., Transformer]
WIDE = {"d_model": 64, "ffn_hidden_size": 32}  # groups of 32 divide both
QWEN: dict[str, Any] = WIDE | {"norm": "rms_norm", "qk_norm": True, "clip_qkv": None}
SHAPES = [WIDE, WIDE | {"ffn": "dense"}, QWEN, QWEN | {"tie_word_embeddings": True, "head_size": 24}]
PLAIN = ("norm", "router", "wte")


def written(folder: Path, model: Transformer, bits: Any = 4) -> Path:
    how = QuantizeConfig(bits=bits, group=32)
    write_published(folder, model.cfg, in_memory(model.state_dict()), None, quantize=how)
    return folder


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, groups: int, seed: int) -> None:
    top = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-top, top, (rows, groups * 32), dtype=torch.int8, generator=generator)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("changes", SHAPES)
def test_each_matrix_comes_back_as_its_codes_whole_and_an_expert_alone(
    tiny: Tiny, changes: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    model = tiny(**changes)
    _, weights = read_published(written(tmp_path, model, bits))
    _, ours = as_one_expert(model.cfg, in_memory(model.state_dict()))
    for name, weight in weights.items():
        dense = ours[name].load()
        if any(part in name for part in PLAIN):
            assert not isinstance(weight, QuantizedWeight)
            assert torch.equal(weight.load(), dense.to(weight.dtype))
            continue
        assert isinstance(weight, QuantizedWeight)
        turned = dense.mT if name.endswith("w2") else dense
        wanted = quantize(turned.contiguous(), 8 if name == "lm_head.weight" else bits, 32)
        assert same(weight.quantized(), wanted)
        assert torch.equal(weight.load(), wanted.dense().mT if name.endswith("w2") else wanted.dense())
        for expert in range(len(dense) if dense.ndim == 3 else 0):
            alone = Quantized(wanted.codes[expert], wanted.scales[expert], bits)
            assert same(weight.expert(expert), alone)
            assert torch.equal(weight.read(expert, expert + 1)[0], weight.load()[expert])


def same(a: Quantized, b: Quantized) -> bool:
    return a.bits == b.bits and torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("changes", [WIDE, QWEN])
def test_an_expert_that_is_not_quantized_is_read_alone_too(tiny: Tiny, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**changes)
    write_published(tmp_path, model.cfg, in_memory(model.state_dict()), None)
    weights = read_published(tmp_path)[1]
    for matrix in ("w1", "v1", "w2"):
        name = f"blocks.1.ffn.experts.{matrix}"
        for expert in range(model.cfg.moe_num_experts):
            assert torch.equal(weights[name].expert(expert), model.state_dict()[name][expert])
            half = weights[name].to(torch.bfloat16).expert(expert)
            assert torch.equal(half, model.state_dict()[name][expert].bfloat16())


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)

    return edit


Q = "model.layers.1.self_attn.q_proj.weight"
GATE = "model.layers.0.mlp.experts.2.gate_proj.weight"


def of_group(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda c: c["config_groups"]["group_0"]["weights"].update(changes))


WRONG = {
    "method": (edit_config(lambda c: c.update(quant_method="gptq")), "quant_method='gptq'"),
    "format": (edit_config(lambda c: c.update(format="float-quantized")), "format='float-quantized'"),
    "no groups": (edit_config(lambda c: c.pop("config_groups")), "lacks 'config_groups'"),
    "asymmetric": (of_group(symmetric=False), "symmetric=False"),
    "by channel": (of_group(strategy="channel", group_size=None), "strategy='channel'"),
    "floats": (of_group(type="float"), "type='float'"),
    "3 bits": (of_group(num_bits=3), "num_bits=3"),
    "group of 16": (of_group(group_size=16), "group_size=16"),
    "ordered by activation": (of_group(actorder="group"), "actorder='group'"),
    "activations": (
        edit_config(lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8})),
        "input_activations=",
    ),
    "zero points": (
        edit_weights(lambda t: t.update({Q + "_zero_point": t[Q + "_scale"].clone()})),
        "_zero_point'; only",
    ),
    "g_idx": (edit_weights(lambda t: t.update({Q + "_g_idx": torch.zeros(64).int()})), "_g_idx'; only"),
    "no scales": (edit_weights(lambda t: t.pop(Q + "_scale")), f"lack '{Q}_scale'"),
    "no codes": (edit_weights(lambda t: t.pop(Q + "_packed")), f"lack '{Q}_packed'"),
    "one expert not": (edit_weights(lambda t: t.pop(GATE + "_packed")), f"lack '{GATE}_packed'"),
    "codes cut": (edit_weights(lambda t: t.update({Q + "_packed": t[Q + "_packed"][1:]})), f"{Q}_packed and"),
    "scales cut": (edit_weights(lambda t: t.update({Q + "_scale": t[Q + "_scale"][:, 1:]})), f"{Q}_packed and"),
    "another shape": (edit_weights(lambda t: t.update({Q + "_shape": torch.tensor([1, 2])})), r"says \(1, 2\)"),
    "wide scales": (edit_weights(lambda t: t.update({Q + "_scale": t[Q + "_scale"].float()})), "bfloat16"),
    "codes elsewhere": (
        edit_weights(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()})),
        "model.norm.weight is stored as torch.int32",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_damaged_or_quantized_in_another_way_is_refused(tiny: Tiny, case: str, tmp_path: Path) -> None:
    damage, message = WRONG[case]
    damage(written(tmp_path, tiny(**QWEN)))
    with pytest.raises(InputError, match=message):
        read_published(tmp_path)


def test_groups_that_do_not_divide_the_inputs_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(**WIDE)
    with pytest.raises(InputError, match=r"group=64 .* 32 inputs of blocks.0.ffn.experts.w2; of these 32 would"):
        write_published(tmp_path, model.cfg, in_memory(model.state_dict()), None, quantize=QuantizeConfig())
