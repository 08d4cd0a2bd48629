"""What transformers 5 does otherwise than the published models are defined, pinned as it is.

A test that fails here says that transformers has changed, and what may become simpler with us.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from both import distance, load_ours, load_theirs, ours_packed, theirs_in_rows
from random_models import Case
from transformers import AutoModelForCausalLM, DbrxConfig, DbrxForCausalLM

from gristmill.hub import read_published
from gristmill.model import ModelConfig

SHAPE = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    kv_n_heads=2,
    max_seq_len=64,
    vocab_size=100,
    ffn_hidden_size=24,
    moe_num_experts=4,
    moe_top_k=2,
    initializer_range=0.2,
)
DBRX = Case("dbrx", 0, SHAPE, (40,))
QWEN = Case("qwen3_moe", 0, replace(SHAPE, norm="rms_norm", qk_norm=True, clip_qkv=None), (40,))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    DBRX.write(tmp_path / "published", DBRX.model())
    return tmp_path / "published"


@contextmanager
def still_raises(error: type[Exception], match: str, otherwise: str) -> Iterator[None]:
    said = None
    try:
        yield
    except error as problem:
        said = str(problem)
    assert said is not None, f"transformers has changed: {otherwise}"
    assert match in said


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def dbrx_config(attn: dict | None = None, ffn: dict | None = None) -> DbrxConfig:
    return DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=1,
        max_seq_len=64,
        vocab_size=100,
        attn_config={"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 500000.0} | (attn or {}),
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2} | (ffn or {}),
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
    )


@torch.no_grad()
def test_1_the_nested_rope_theta_is_ignored_and_10000_used(published: Path, tmp_path: Path) -> None:
    documents = DBRX.tokens()
    meant = theirs_in_rows(load_theirs(published), documents)
    edit_config(published, lambda config: config.pop("rope_parameters"))  # as the 132B model was published
    theirs = load_theirs(published)
    assert theirs.config.attn_config.rope_theta == 500000.0
    used = theirs.config.rope_parameters["rope_theta"]
    assert used == 10000.0, (
        "transformers has changed: it reads attn_config.rope_theta; hub/layouts/dbrx.py need not write both"
    )
    assert distance(theirs_in_rows(theirs, documents), meant) > 0.01
    # Ours reads what was published, also after transformers has saved its own 10000 beside it.
    theirs.save_pretrained(tmp_path / "saved")
    for folder in (published, tmp_path / "saved"):
        assert read_published(folder)[0] == SHAPE
        assert distance(ours_packed(load_ours(folder), documents), meant) <= 2e-5


def test_1_and_yet_the_nested_rope_theta_must_be_there(published: Path) -> None:
    edit_config(published, lambda config: config["attn_config"].pop("rope_theta"))
    with still_raises(AttributeError, "rope_theta", "hub/layouts/dbrx.py may leave attn_config.rope_theta away"):
        load_theirs(published)


def test_2_the_default_configuration_raises() -> None:
    with torch.device("meta"), still_raises(AttributeError, "rope_theta", "its default configuration works"):
        DbrxForCausalLM(DbrxConfig())


def test_2_no_clipping_raises() -> None:
    model = DbrxForCausalLM(dbrx_config(attn={"clip_qkv": None}))
    with still_raises(
        RuntimeError, "'min' or 'max' must not be None", "NO_CLIP in hub/layouts/dbrx.py is there for vLLM alone"
    ):
        model(torch.tensor([[1, 2]]))


@torch.no_grad()
def test_3_the_router_computes_in_the_models_dtype(published: Path) -> None:
    model = load_theirs(published, torch.bfloat16)
    weights = []
    model.transformer.blocks[0].ffn.experts.register_forward_pre_hook(lambda module, args: weights.append(args[2]))
    theirs_in_rows(model, DBRX.tokens())
    assert weights[0].dtype == torch.bfloat16
    off = float((weights[0].float().sum(-1) - 1).abs().max())
    assert off > 1e-3, "transformers has changed: its weights sum to 1; tighten the bounds in test_exact_in_bf16.py"


def test_4_jitter_changes_the_experts_input_in_place() -> None:
    ffn = DbrxForCausalLM(dbrx_config(ffn={"moe_jitter_eps": 0.5})).transformer.blocks[0].ffn.train()
    given = torch.ones(1, 8, 32)
    ffn(given)
    unchanged = torch.equal(given, torch.ones(1, 8, 32))
    assert not unchanged, "transformers has changed: jitter leaves the experts' input alone, as it does with us"


def test_5_the_integer_1_is_refused_as_a_norm() -> None:
    assert dbrx_config(ffn={"moe_normalize_expert_weights": 1.0}).ffn_config.moe_normalize_expert_weights == 1.0
    with still_raises(
        Exception, "moe_normalize_expert_weights", "hub/layouts/dbrx.py need not make a float of the norm"
    ):
        dbrx_config(ffn={"moe_normalize_expert_weights": 1})


@torch.no_grad()
def test_6_the_default_experts_of_qwen3_moe_refuse_widths_that_are_no_multiple_of_16_bytes(tmp_path: Path) -> None:
    case = replace(QWEN, cfg=replace(QWEN.cfg, ffn_hidden_size=25))
    case.write(tmp_path, case.model())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with still_raises(RuntimeError, "multiple of 16 bytes", "experts_implementation='eager' is not needed any more"):
        theirs_in_rows(model, case.tokens())
    theirs_in_rows(load_theirs(tmp_path), case.tokens())


@torch.no_grad()
@pytest.mark.parametrize("case", [DBRX, QWEN], ids=lambda case: case.layout)
def test_7_the_rotary_cosines_are_rounded_to_the_models_dtype(case: Case, tmp_path: Path) -> None:
    case.write(tmp_path, case.model())
    model = load_theirs(tmp_path, torch.bfloat16)
    angles = []
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    rotary.register_forward_hook(lambda module, given, out: angles.append(out[0]))
    theirs_in_rows(model, case.tokens())
    changed = "transformers has changed: its rotation is in fp32; tighten the bounds in test_exact_in_bf16.py"
    assert angles[0].dtype == torch.bfloat16, changed


def test_8_saved_qwen3_moe_calls_the_number_of_experts_num_local_experts(tmp_path: Path) -> None:
    QWEN.write(tmp_path, QWEN.model())
    load_theirs(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "num_experts" not in saved, "transformers has changed: hub/layouts/qwen3_moe.py may read num_experts alone"
    assert saved["num_local_experts"] == 4
    assert read_published(tmp_path / "saved")[0] == QWEN.cfg
