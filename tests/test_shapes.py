"""The shipped shapes: as large as their names say, and as the same model built on the meta device."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gristmill.errors import InputError
from gristmill.hub.layouts.dbrx import DBRX
from gristmill.hub.layouts.qwen3_moe import QWEN3_MOE
from gristmill.model import Transformer
from gristmill.model.counts import count_params
from gristmill.recipe import load_recipe, load_shape, shipped_recipes
from gristmill.report.shape import shape_text, short

# name -> parameters and active ones, in billions: published for dbrx-132b and Qwen3 (30.5 and 3.3), else by arithmetic
SIZES = {
    "dbrx-132b": (131.60, 36.47),
    "dbrx-73b": (73.51, 20.66),
    "dbrx-35b": (35.65, 10.29),
    "dbrx-18b": (18.61, 5.53),
    "dbrx-9b": (9.17, 2.83),
    "dbrx-3b": (2.97, 1.03),
    "dbrx-1b": (1.03, 0.43),
    "dbrx-300m": (0.31, 0.16),
    "qwen3-30b-a3b": (30.53, 3.35),
}


def test_every_shipped_shape_is_listed_here() -> None:
    assert {name for name in shipped_recipes() if name != "quickstart"} == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_a_shape_has_the_parameters_of_its_model_on_the_meta_device(name: str) -> None:
    cfg = load_shape(name).model
    with torch.device("meta"):
        sizes = {key: param.numel() for key, param in Transformer(cfg).named_parameters()}
    counts = count_params(cfg)
    assert counts.total_params == sum(sizes.values())
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    unused = experts // cfg.moe_num_experts * (cfg.moe_num_experts - cfg.moe_top_k)
    assert counts.active_params == counts.total_params - unused
    assert (round(counts.total_params / 1e9, 2), round(counts.active_params / 1e9, 2)) == SIZES[name]


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("dbrx")])
def test_the_family_is_fine_grained_with_a_ratio_of_seven_quarters(name: str) -> None:
    cfg = load_shape(name).model
    assert (cfg.moe_num_experts, cfg.moe_top_k, cfg.vocab_size) == (16, 4, 100352)
    assert cfg.ffn_hidden_size * 4 == cfg.d_model * 7
    assert cfg.head_dim == (64 if name == "dbrx-300m" else 128)


def test_dbrx_is_its_published_configuration() -> None:
    published = {
        "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768,
        "vocab_size": 100352, "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {
            "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_loss_weight": 0.05,
            "moe_jitter_eps": 0,
        },
    }  # fmt: skip
    assert load_shape("dbrx-132b").model == DBRX.from_json(published)


def test_qwen_is_its_published_configuration_and_as_large_as_transformers_makes_it() -> None:
    published = {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144, "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
        "initializer_range": 0.02, "attention_bias": False,
    }  # fmt: skip
    cfg = load_shape("qwen3-30b-a3b").model
    assert cfg == QWEN3_MOE.from_json(published)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**published))
    assert count_params(cfg).total_params == sum(param.numel() for param in model.parameters())


def test_dbrx_prints_its_published_sizes() -> None:
    shape = load_shape("dbrx-132b")
    lines = shape_text(shape.name, shape.model, shape.context).splitlines()
    assert lines[0] == "dbrx-132b: 131.60B parameters, 36.47B active"
    total = next(line.split() for line in lines if line.startswith("  total"))
    assert total[:5] == ["total", "131,596,523,520", "131.60B", "36,469,708,800", "36.47B"]
    table = lines[2 : lines.index("", 2)]
    assert len({len(line) for line in table[1:]}) == 1
    for said in ("163,840", "5.37 GB", "263,193,047,040  263.19 GB", "526.39 GB", "1.58 TB"):
        assert said in "\n".join(lines)


def test_numbers_are_rounded_to_two_decimals() -> None:
    assert [short(x) for x in (0, 999, 1234, 5_678_000, 131_596_523_520, 2.5e12)] == [
        "0", "999", "1.23k", "5.68M", "131.60B", "2.50T",
    ]  # fmt: skip
    assert short(87_812_419_584, "FLOP") == "87.81 GFLOP"
    assert short(12, "B") == "12 B"


def test_any_recipe_is_counted_at_the_length_that_it_trains_at() -> None:
    assert load_shape("quickstart").model == load_recipe("quickstart")["model"]
    assert load_shape("quickstart", ["train.seq_len=256"]).context == 256
    assert load_shape("dbrx-9b").context == 4096
    assert load_shape("dbrx-9b", ["model.n_layers=2"]).model.n_layers == 2
    with pytest.raises(InputError, match=r"model\.moe_topk: unknown key"):
        load_shape("dbrx-9b", ["model.moe_topk=2"])


def test_a_shape_is_run_by_a_recipe_that_adds_text_and_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dbrx-9b has no corpus and no train section.*`base: dbrx-9b` and adds"):
        load_recipe("dbrx-9b")
    file = tmp_path / "mine.yaml"
    file.write_text("base: dbrx-9b\nname: mine\ncorpus: {sources: {notes: {path: ., license: MIT}}}\n")
    with pytest.raises(InputError, match=r"mine\.yaml has no train section.*; add train"):
        load_recipe(str(file))
    file.write_text(file.read_text() + "train: {steps: 10}\n")
    recipe = load_recipe(str(file))
    assert recipe["model"] == load_shape("dbrx-9b").model
    assert recipe.name == "mine"
