"""The other direction: checkpoints that transformers builds and saves are read by us, and compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from both import distance, load_ours, load_theirs, ours_packed, theirs_in_rows
from random_models import Case
from safetensors.torch import load_file
from transformers import DbrxConfig, DbrxForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gristmill.hub import read_published, write_published
from gristmill.model import ModelConfig

DOCUMENTS = Case("dbrx", 0, ModelConfig(vocab_size=97), (40, 3, 150)).tokens()


def dbrx() -> Any:
    return DbrxForCausalLM(
        DbrxConfig(
            d_model=48,
            n_heads=6,
            n_layers=2,
            max_seq_len=256,
            vocab_size=97,
            attn_config={"clip_qkv": 1.5, "kv_n_heads": 2, "rope_theta": 7000.0},
            ffn_config={
                "ffn_hidden_size": 40,
                "moe_num_experts": 6,
                "moe_top_k": 3,
                "moe_normalize_expert_weights": 2.0,
            },
            rope_parameters={"rope_theta": 7000.0, "rope_type": "default"},
        )
    )


def qwen3_moe(tied: bool) -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=48,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            num_hidden_layers=2,
            max_position_embeddings=256,
            vocab_size=97,
            moe_intermediate_size=40,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            rms_norm_eps=1e-4,
            tie_word_embeddings=tied,
            rope_parameters={"rope_theta": 7000.0, "rope_type": "default"},
        )
    )


MODELS = {"dbrx": dbrx, "qwen3_moe": lambda: qwen3_moe(False), "qwen3_moe tied": lambda: qwen3_moe(True)}


def save(name: str, folder: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)  # a norm's scale is about 1
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_saved_by_transformers_in_shards_has_its_logits(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save(name, tmp_path, dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _, weights = read_published(tmp_path)
    assert {weight.dtype for weight in weights.values()} == {dtype}
    wanted = theirs_in_rows(load_theirs(tmp_path), DOCUMENTS)
    assert distance(ours_packed(load_ours(tmp_path), DOCUMENTS), wanted) <= 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_file_that_we_write_again_is_the_one_that_transformers_saved(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "saved", torch.float32)
    cfg, weights = read_published(tmp_path / "saved")
    (tmp_path / "ours").mkdir()
    write_published(tmp_path / "ours", cfg, weights, None)
    files = (tmp_path / "saved").glob("*.safetensors")
    theirs = {key: tensor for file in files for key, tensor in load_file(file).items()}
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
