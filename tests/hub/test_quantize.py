import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gristmill import artifact
from gristmill.errors import Failure, InputError
from gristmill.hub import assemble, in_memory, open_weights, read_published, write_published
from gristmill.hub.export import export_model
from gristmill.hub.folder import open_model
from gristmill.hub.mapping import as_one_expert
from gristmill.hub.quantized import QuantizeConfig, QuantizedWeight
from gristmill.hub.tensors import SINGLE
from gristmill.inference import load_model
from gristmill.inference.quantizing import quantize_model
from gristmill.kernels.quantized import Quantized, quantize, width_of
from gristmill.model import Transformer, packed

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
    words = width_of(bits).pack(codes)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)
    assert torch.equal(width_of(bits).unpack(words), codes)


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
            alone = Quantized(wanted.words[expert], wanted.scales[expert], bits)
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


def test_an_expert_of_a_tensor_that_several_ranks_hold_is_read_from_its_parts(tmp_path: Path) -> None:
    whole = torch.arange(5 * 4 * 6.0).view(5, 4, 6)
    places = [(0, 3, 0, 2), (0, 3, 2, 4), (3, 5, 0, 4)]
    save_file({f"w1@{a},{c},0": whole[a:b, c:d].contiguous() for a, b, c, d in places}, tmp_path / SINGLE)
    weight = open_weights(tmp_path)["w1"]
    assert all(torch.equal(weight.expert(expert), whole[expert]) for expert in range(5))
    assert torch.equal(weight.read(1, 4), whole[1:4])
    assert torch.equal(weight.load(), whole)


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
    with pytest.raises(InputError, match=r"group=64 .* 32 inputs of blocks.0.ffn.experts.w2; 32 would"):
        write_published(tmp_path, model.cfg, in_memory(model.state_dict()), None, quantize=QuantizeConfig())


@pytest.mark.parametrize("changes", SHAPES[2:])
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_transformers_with_compressed_tensors_computes_the_same(
    tiny: Tiny, changes: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    cfg, weights = read_published(written(tmp_path, tiny(**changes), bits))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, experts_implementation="eager")
    tokens = torch.randint(292, (2, 24), generator=torch.Generator().manual_seed(1))
    theirs(tokens)  # the first call decompresses
    for parameter in theirs.parameters():
        parameter.data = parameter.data.float()
    for name, weight in weights.items():
        if ".out_proj." in name:
            layer = theirs.model.layers[int(name.split(".")[1])]
            assert torch.equal(layer.self_attn.o_proj.weight, weight.load().bfloat16().float())
    model = assemble(cfg, {name: weight.to(torch.bfloat16) for name, weight in weights.items()})
    positions = torch.arange(24).expand(2, -1)
    ours = model.logits(model(tokens, positions, packed(torch.zeros_like(tokens)))[0])
    wanted = theirs(tokens).logits
    assert (ours - wanted).abs().max() <= 2e-5 * wanted.abs().max()


# ---- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    file = tmp_path / "held-out.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("def add(a, b): return a", "Mehl. " * 20)))
    return file


HOW = QuantizeConfig(bits=4, group=32)


def test_the_loss_is_that_of_the_written_model_and_stands_in_manifest_and_card(
    checkpoint: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    src = checkpoint(**WIDE)
    made = quantize_model(src, tmp_path / "small", HOW, documents)
    loss = made.metrics["documents_bits_per_byte"]
    assert "test_bits_per_byte" not in made.metrics  # it is for the test documents of the model's own corpus
    for path, figure in ((src, "before"), (made.path, "after")):
        model, tokenizer = load_model(path)
        nats = num_bytes = 0.0
        for line in documents.read_text().splitlines():
            ids = [tokenizer.eot_id, *tokenizer.encode(json.loads(line)["text"])]
            assert len(ids) <= 96  # of the context: no windows
            num_bytes += len(json.loads(line)["text"].encode())
            tokens = torch.tensor([ids])
            hidden, _ = model(tokens, torch.arange(len(ids))[None], packed(torch.zeros_like(tokens)))
            logits = model.logits(hidden[0, :-1])
            nats += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        assert loss[figure] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert loss["loss"] == pytest.approx(loss["after"] / loss["before"] - 1)
    assert loss["documents"] == 2
    card = (made.path / "README.md").read_text()
    figures = f"{loss['before']:.3f} -> {loss['after']:.3f} ({loss['loss']:+.2%})"
    assert f"bits per byte of the given documents {figures}" in card


def test_documents_are_read_as_those_of_a_corpus(
    checkpoint: Callable[..., Path], documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = checkpoint(**WIDE)
    cells = [json.loads(line)["text"].encode() for line in documents.read_text().split("\n") if line]
    table = pa.table({"text": pa.array([*cells, b"caf\xe9"], pa.binary()).view(pa.string())})
    pq.write_table(table, tmp_path / "held-out.parquet")
    packed = pa.compress(documents.read_bytes(), codec="zstd", asbytes=True)
    (tmp_path / "held-out.jsonl.zst").write_bytes(packed)
    losses = []
    for number, name in enumerate(("held-out.jsonl", "held-out.jsonl.zst", "held-out.parquet")):
        made = quantize_model(src, tmp_path / f"small {number}", HOW, tmp_path / name)
        losses.append(made.metrics["documents_bits_per_byte"])
    assert losses[0] == losses[1] == losses[2]
    assert "not_utf8: 1, e.g. held-out.parquet#2" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("changes", [WIDE, QWEN])
def test_the_stored_bytes_of_a_quantized_directory_are_those_of_its_tensors(
    tiny: Tiny, tmp_path: Path, bits: int, changes: dict[str, Any]
) -> None:
    (tmp_path / "src").mkdir()
    write_published(tmp_path / "src", (model := tiny(**changes)).cfg, in_memory(model.state_dict()), None)
    made = quantize_model(tmp_path / "src", tmp_path / "small", QuantizeConfig(bits=bits, group=32))
    for folder in (tmp_path / "src", made.path):
        tensors = load_file(folder / SINGLE)
        stored = open_model(folder).stored_bytes
        assert sum(stored.values()) == sum(tensor.nbytes for tensor in tensors.values())
        codes = [tensor for name, tensor in tensors.items() if name.endswith(("_packed", "_scale", "_shape"))]
        in_codes = sum(size for form, size in stored.items() if form.endswith("-bit codes and scales"))
        assert in_codes == sum(tensor.nbytes for tensor in codes)
        assert bool(codes) == (f"{bits}-bit codes and scales" in stored)


def test_the_lineage_names_the_model_and_its_data(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    src = checkpoint(**WIDE)
    made = quantize_model(src, tmp_path / "small", HOW)
    assert made.metrics["test_bits_per_byte"] is None
    assert "not measured" in (made.path / "README.md").read_text()
    assert made.manifest["inputs"]["model"]["content"] == artifact.load(src).content
    assert made.licenses == artifact.load(src).licenses
    assert not artifact.verify(made.path).problems
    size = sum(file.stat().st_size for file in made.path.glob("*.safetensors"))
    assert made.metrics["weight_bytes"] == pytest.approx(size, rel=0.1)


def test_a_model_from_elsewhere_is_named_with_its_hash_and_license(tiny: Tiny, tmp_path: Path) -> None:
    src = tmp_path / "theirs"
    src.mkdir()
    write_published(src, (model := tiny(**QWEN)).cfg, in_memory(model.state_dict()), None)
    (src / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    made = quantize_model(src, tmp_path / "small", HOW)
    assert made.manifest["sources"]["theirs"]["fingerprint"]
    assert "license: apache-2.0" in (made.path / "README.md").read_text()
    assert (made.path / "ORIGINAL_README.md").is_file()


def test_a_quantized_model_is_exported_as_any_other_but_not_quantized_again(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    made = quantize_model(checkpoint(**WIDE), tmp_path / "small", HOW)
    dense = export_model(made.path, tmp_path / "dense")
    back, codes = read_published(dense.path)[1], read_published(made.path)[1]
    assert all(torch.equal(back[name].load(), codes[name].load()) for name in codes)
    with pytest.raises(InputError, match="is quantized already"):
        quantize_model(made.path, tmp_path / "smaller", HOW)
    assert not (tmp_path / "smaller").exists()


def test_damage_and_wrong_input_leave_nothing(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    src, out = checkpoint(**WIDE), tmp_path / "small"
    (tmp_path / "empty.txt").write_text("")
    for wrong in ("empty.txt", "absent.txt"):
        with pytest.raises(InputError, match=wrong):
            quantize_model(src, out, HOW, tmp_path / wrong)
    with pytest.raises(InputError, match="bits=3"):
        QuantizeConfig(bits=3)
    with pytest.raises(InputError, match="group=64 must divide the 32 inputs"):
        quantize_model(src, out, QuantizeConfig())
    with (src / SINGLE).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(Failure, match="is damaged: its SHA-256"):
        quantize_model(src, out, HOW)
    assert not out.exists()
    assert not list(tmp_path.glob(".*partial"))
