"""transformers' DBRX in fp32 is the reference: the published layout, opened by somebody else's code."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gristmill.hub import assemble, in_memory, read_published, write_published
from gristmill.hub.export import ExportConfig, build_export
from gristmill.hub.settings import SpecialIds
from gristmill.inference import Sampling, generate, load_model
from gristmill.model import Transformer, packed
from gristmill.tokenizer import Tokenizer

Tiny = Callable[..., Transformer]
IDS = SpecialIds(eot_id=292, pad_id=297, im_end_id=299)
SHAPES = [
    {},
    {"ffn": "dense"},
    {"moe_num_experts": 16, "moe_top_k": 4, "kv_n_heads": 1},
    {"clip_qkv": 0.5, "moe_normalize_expert_weights": None},
    {"clip_qkv": None, "rope_theta": 10000.0, "moe_normalize_expert_weights": 2.0, "moe_jitter_eps": 0.01},
]


def reference(folder: Path):  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def ours(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model.logits(model(tokens, positions, packed(torch.zeros_like(tokens)))[0])


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_exported_logits_and_greedy_tokens_equal_transformers(tiny: Tiny, changes: dict, tmp_path: Path) -> None:
    model = tiny(**changes)
    write_published(tmp_path, model.cfg, in_memory(model.state_dict()), IDS)
    theirs = reference(tmp_path)
    tokens = torch.randint(292, (2, 48), generator=torch.Generator().manual_seed(1))
    wanted, given = theirs(tokens).logits, ours(model, tokens)
    assert (given - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    for prompt in (tokens[0, :5], tokens[1, :20]):
        made = list(generate(model, prompt.tolist(), Sampling(temperature=0.0), 32))
        mask = torch.ones_like(prompt)[None]
        theirs_made = theirs.generate(
            prompt[None], attention_mask=mask, do_sample=False, max_new_tokens=32, eos_token_id=-1
        )
        assert made == theirs_made[0, len(prompt) :].tolist()


def test_a_model_made_by_transformers_is_read_with_equal_logits(tiny: Tiny, tmp_path: Path) -> None:
    write_published(tmp_path, (model := tiny()).cfg, in_memory(model.state_dict()), IDS)
    theirs = reference(tmp_path)
    torch.manual_seed(3)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    back = assemble(*read_published(tmp_path / "saved"))
    assert back.cfg == model.cfg
    tokens = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, given = theirs(tokens).logits, ours(back, tokens)
    assert (given - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_the_exported_stage_loads_with_plain_auto_classes(
    checkpoint: Callable[..., Path], evaluation: Path, tmp_path: Path
) -> None:
    out = tmp_path / "export"
    out.mkdir()
    built = build_export(ExportConfig(), checkpoint(), evaluation, out)
    assert built.metrics["export_max_logit_diff"] < 1e-4
    assert built.metrics["export_greedy_equal"] + built.metrics["export_greedy_ties"] == 3
    tokenizer, theirs = AutoTokenizer.from_pretrained(out, local_files_only=True), reference(out)
    assert tokenizer("Körner def add").input_ids == Tokenizer.load(out).encode_prompt("Körner def add")
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert theirs.generation_config.eos_token_id == stops
    model, loaded = load_model(out)
    text = loaded.encode("The mill")
    with torch.no_grad():
        wanted, given = theirs(torch.tensor([text])).logits, ours(model, torch.tensor([text]))
    assert (given - wanted).abs().max() <= 2e-5 * wanted.abs().max()
