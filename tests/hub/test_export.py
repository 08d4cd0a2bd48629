import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from gristmill import artifact
from gristmill.errors import Failure, InputError
from gristmill.hub import (
    assemble,
    in_memory,
    open_weights,
    read_checkpoint,
    read_published,
    write_published,
    write_weights,
)
from gristmill.hub import export as export_module
from gristmill.hub.export import ExportConfig, build_export, export_gguf, export_model
from gristmill.hub.importing import import_model
from gristmill.hub.layouts.dbrx import DBRX
from gristmill.hub.quantized import QuantizeConfig
from gristmill.hub.settings import SpecialIds
from gristmill.hub.tensors import INDEX, SINGLE, Weights
from gristmill.inference.quantizing import quantize_model
from gristmill.inference.scorer import causal
from gristmill.model import ModelConfig, Transformer
from gristmill.tokenizer import Tokenizer

Tiny = Callable[..., Transformer]
IDS = SpecialIds(eot_id=292, pad_id=297, im_end_id=299)


def loaded(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: weight.load() for name, weight in weights.items()}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_export_then_import_is_bit_identical(tiny: Tiny, tmp_path: Path, max_shard_bytes: int) -> None:
    model = tiny()
    write_published(tmp_path, model.cfg, in_memory(model.state_dict()), IDS, max_shard_bytes=max_shard_bytes)
    cfg, tensors = read_published(tmp_path)
    assert cfg == model.cfg
    back = loaded(tensors)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_shards_stay_within_their_size_and_the_index_names_each_tensor(tiny: Tiny, tmp_path: Path) -> None:
    write_published(tmp_path, (model := tiny()).cfg, in_memory(model.state_dict()), IDS, max_shard_bytes=30_000)
    index = json.loads((tmp_path / INDEX).read_text())
    sizes = {name: tensor.nbytes for name, tensor in loaded(open_weights(tmp_path)).items()}
    assert index["weight_map"].keys() == sizes.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in set(index["weight_map"].values()):
        inside = [sizes[name] for name, where in index["weight_map"].items() if where == file]
        assert sum(inside) <= 30_000 or len(inside) == 1
    assert not (tmp_path / SINGLE).exists()


def test_published_tensors_have_dbrx_names_and_shapes(tiny: Tiny, tmp_path: Path) -> None:
    write_published(tmp_path, (model := tiny()).cfg, in_memory(model.state_dict()), IDS, dtype=torch.bfloat16)
    published = loaded(open_weights(tmp_path))
    block = {
        name.removeprefix("transformer.blocks.1."): tuple(tensor.shape)
        for name, tensor in published.items()
        if name.startswith("transformer.blocks.1.")
    }
    assert block == {
        "norm_attn_norm.norm_1.weight": (32,),
        "norm_attn_norm.norm_2.weight": (32,),
        "norm_attn_norm.attn.Wqkv.weight": (64, 32),
        "norm_attn_norm.attn.out_proj.weight": (32, 32),
        "ffn.router.layer.weight": (4, 32),
        "ffn.experts.mlp.w1": (96, 32),
        "ffn.experts.mlp.v1": (96, 32),
        "ffn.experts.mlp.w2": (96, 32),
    }
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}


def test_dense_ffn_leaves_as_one_expert_that_computes_exactly_the_same(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(ffn="dense", moe_loss_weight=0.0, moe_num_experts=1, moe_top_k=1)
    write_published(tmp_path, model.cfg, in_memory(model.state_dict()), IDS)
    back = assemble(*read_published(tmp_path))
    assert (back.cfg.ffn, back.cfg.moe_num_experts, back.cfg.moe_top_k) == ("moe", 1, 1)
    for block, expert in zip(model.blocks, back.blocks, strict=True):
        for name in ("w1", "v1", "w2"):
            assert torch.equal(getattr(block.ffn, name), getattr(expert.ffn.experts, name)[0])
        assert not expert.ffn.router.weight.any()


def test_configuration_survives_the_published_form_and_the_published_file_is_read() -> None:
    cfg = ModelConfig(vocab_size=384, clip_qkv=None, moe_normalize_expert_weights=None, rope_theta=7.5)
    assert DBRX.from_json(DBRX.to_json(cfg, IDS, torch.float32)) == cfg
    published = {  # the values of the 132B model's config.json: theta only nested, normalisation left out, integers
        "model_type": "dbrx",
        "vocab_size": 100352,
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "max_seq_len": 32768,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {
            "ffn_hidden_size": 10752,
            "moe_jitter_eps": 0,
            "moe_loss_weight": 0.05,
            "moe_num_experts": 16,
            "moe_top_k": 4,
        },
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }
    assert DBRX.from_json(published) == ModelConfig(vocab_size=100352)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_parameters=\{'rope_type': 'yarn'"),
        ({"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "name='gelu'"),
        ({"d_model": 30}, "d_model=30"),
        ({"attn_config": {"kv_n_heads": 8}, "rope_parameters": None}, "rope_theta"),
    ],
)
def test_what_this_model_cannot_compute_is_refused_on_import(change: dict, says: str, tmp_path: Path) -> None:
    config = DBRX.to_json(ModelConfig(vocab_size=384), IDS, torch.float32) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        read_published(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tiny: Tiny, tmp_path: Path) -> None:
    write_published(tmp_path, (model := tiny()).cfg, in_memory(model.state_dict()), IDS)
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickles \(pytorch_model.bin\), which can run code"):
        loaded(read_published(tmp_path)[1])


def test_wrong_weights_are_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    state = dict(model.state_dict())
    with pytest.raises(InputError, match=r"lack 'lm_head.weight'"):
        assemble(model.cfg, in_memory({k: v for k, v in state.items() if k != "lm_head.weight"}))
    with pytest.raises(InputError, match="'extra', which"):
        assemble(model.cfg, in_memory(state | {"extra": torch.zeros(1)}))
    with pytest.raises(InputError, match=r"norm_f.weight has shape \(3,\)"):
        assemble(model.cfg, in_memory(state | {"norm_f.weight": torch.zeros(3)}))
    write_published(tmp_path, model.cfg, in_memory(state), IDS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["ffn_config"]["moe_num_experts"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"ffn.router.layer.weight has shape \(4, 32\); the configuration says \(8, 32\)"
    ):
        assemble(*read_published(tmp_path))


def test_an_index_cannot_lead_out_of_its_folder_and_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(InputError, match="elsewhere"):
        loaded(open_weights(tmp_path))
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(Failure, match="weight_map"):
        loaded(open_weights(tmp_path))
    write_weights(tmp_path, in_memory({"a": torch.zeros(100)}))
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-9])
    with pytest.raises(Failure, match=SINGLE):
        loaded(open_weights(tmp_path))


def test_a_stored_compute_dtype_gives_exactly_what_casting_at_each_use_gives(
    checkpoint: Callable[..., Path], tiny: Tiny
) -> None:
    cfg, tensors = read_checkpoint(checkpoint())
    packed_bf16 = assemble(cfg, tensors, torch.bfloat16)
    cast = Transformer(cfg, torch.bfloat16).eval()
    cast.load_state_dict(tiny().state_dict())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        hidden = [model(tokens, tokens, causal)[0] for model in (packed_bf16, cast)]
        assert torch.equal(packed_bf16.logits(hidden[0]), cast.logits(hidden[1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_card_names_every_license_and_figure_in_a_front_matter_that_the_hub_reads(
    checkpoint: Callable[..., Path], evaluation: Path, tmp_path: Path, dtype: str
) -> None:
    out = artifact.prepare(tmp_path / "export")
    path = checkpoint(ffn="dense")
    built = build_export(ExportConfig(name="miller", dtype=dtype), path, evaluation, out)
    assert built.metrics["export_max_logit_diff"] < 1e-4
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {(result.metric_name, result.metric_value) for result in card.data.eval_results} == {
        ("bits per byte (all)", 2.5),
        ("bits per byte (code)", 2.25),
        ("bits per byte (prose)", 3.0),
    }
    loaded = artifact.load(path)
    for license, num_bytes in loaded.licenses.items():
        assert f"| {license} | {num_bytes:,} |" in card.text
    assert len(loaded.licenses) == 3
    for said in ("numpy 2.0", "notes", loaded.content, "Intended use", "Limits", "50% parse", "xz -9e"):
        assert said in card.text
    assert "/home/me" not in card.text


def test_the_stage_writes_the_same_bytes_again(
    checkpoint: Callable[..., Path], evaluation: Path, tmp_path: Path
) -> None:
    path, made = checkpoint(), []
    for name in ("a", "b"):
        out = artifact.prepare(tmp_path / name)
        build_export(ExportConfig(max_shard_bytes=40_000), path, evaluation, out)
        made.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert made[0] == made[1]


def test_an_export_that_computes_something_else_fails(
    checkpoint: Callable[..., Path], evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(folder: Path, cfg: ModelConfig, weights: Weights, *args: object, **kwargs: object) -> None:
        state = dict(weights)
        for layer in range(cfg.n_layers):
            w1, v1 = (f"blocks.{layer}.ffn.experts.{name}" for name in ("w1", "v1"))
            state[w1], state[v1] = state[v1], state[w1]
        write_published(folder, cfg, state, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(export_module, "write_published", swapped)
    with pytest.raises(Failure, match="logits in transformers differ"):
        build_export(ExportConfig(), checkpoint(), evaluation, artifact.prepare(tmp_path / "export"))


def test_an_evaluation_that_is_none_is_an_input_error(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation.json"):
        build_export(ExportConfig(), checkpoint(), tmp_path / "nothing", artifact.prepare(tmp_path / "export"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems accept only UTF-8 as a file's name")
def test_a_model_goes_in_and_out_of_folders_whose_names_are_not_utf8(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    src = checkpoint(ffn_hidden_size=32)
    name = os.fsdecode(b"M\xfchle")
    out = export_model(src, tmp_path / name).path
    assert "# M\ufffdhle\n" in (out / "README.md").read_text()
    ours = import_model(out, tmp_path / f"{name} again").path
    small = quantize_model(ours, tmp_path / f"{name} small", QuantizeConfig(group=32)).path
    assert "# M\ufffdhle small\n" in (small / "README.md").read_text()
    file = export_gguf(src, tmp_path / f"{name}.gguf")
    assert b"M\xef\xbf\xbdhle" in file.read_bytes()


def test_an_export_of_a_bare_checkpoint_goes_out_again(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    """It has no artifact before it that could name a license."""
    bare, once = tmp_path / "bare", tmp_path / "once"
    bare.mkdir()
    write_weights(bare, in_memory((model := tiny()).state_dict()))
    (bare / "model.json").write_text(json.dumps(asdict(model.cfg)))
    shutil.copytree(tokenizer_dir, bare / "tokenizer")
    export_model(bare, once)
    assert ModelCard.load(export_model(once, tmp_path / "twice").path / "README.md").data.license == "other"
    export_gguf(once, tmp_path / "twice.gguf")


def test_a_model_that_an_earlier_version_trained_leaves_with_its_start_token(
    checkpoint: Callable[..., Path], evaluation: Path, tmp_path: Path
) -> None:
    """Its tokenizer's files say that nothing is added to a text; generation and training put the token there."""
    path = checkpoint()
    for name, changes in (
        ("tokenizer.json", {"post_processor": None}),
        ("tokenizer_config.json", {"add_bos_token": False}),
    ):
        file = path / "tokenizer" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (path / "manifest.json").unlink()
    artifact.commit(path, kind="checkpoint", key="k", config={}, inputs={}, built=artifact.Built())
    build_export(ExportConfig(), path, evaluation, artifact.prepare(tmp_path / "stage"))
    for out in (tmp_path / "stage", export_model(path, tmp_path / "out").path):
        tokenizer, theirs = (
            Tokenizer.load(path / "tokenizer"),
            AutoTokenizer.from_pretrained(out, local_files_only=True),
        )
        assert theirs("The mill")["input_ids"] == [tokenizer.eot_id, *tokenizer.encode("The mill")]
        assert tokenizer.encode_prompt("The mill") == Tokenizer.load(out).encode_prompt("The mill")
        assert json.loads((out / "tokenizer_config.json").read_text())["add_bos_token"] is True
    found = gguf.GGUFReader(export_gguf(path, tmp_path / "out.gguf")).fields
    assert found["tokenizer.ggml.add_bos_token"].contents() is True
