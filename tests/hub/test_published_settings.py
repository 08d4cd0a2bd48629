"""Each key of a published configuration means something here, changes nothing, or is refused by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DbrxConfig, Qwen3MoeConfig

from gristmill.errors import InputError
from gristmill.hub import assemble, in_memory, read_published, write_published
from gristmill.hub.importing import import_model
from gristmill.hub.layouts import LAYOUTS as PUBLISHED
from gristmill.hub.tensors import SINGLE
from gristmill.model import Transformer, packed

Tiny = Callable[..., Transformer]
TOKENS = torch.tensor([[7, 300, 2, 41, 5, 5, 199, 383, 0, 12, 77, 3]])
QWEN = {"norm": "rms_norm", "norm_eps": 1e-6, "qk_norm": True, "clip_qkv": None, "head_size": 12}
SHAPES = {"dbrx": {"clip_qkv": 0.4}, "qwen3_moe": QWEN}
CLASSES = {"dbrx": DbrxConfig, "qwen3_moe": Qwen3MoeConfig}
LAYOUTS = {layout.model_type: layout for layout in PUBLISHED}


@pytest.fixture
def publish(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small directory with random weights; `change` edits its config.json."""

    def make(layout: str, change: Callable[[dict], object] = lambda config: None, **shape: Any) -> Path:
        model, folder = tiny(**{**SHAPES[layout], **shape}), tmp_path / "published"
        folder.mkdir(exist_ok=True)
        write_published(folder, model.cfg, in_memory(model.state_dict()), None)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@torch.no_grad()
def distance_from_transformers(folder: Path) -> float:
    """Between the logits of the directory here and in transformers, in parts of the largest."""
    model = assemble(*read_published(folder))
    hidden, _ = model(TOKENS, torch.arange(TOKENS.shape[1])[None], packed(torch.zeros_like(TOKENS)))
    reference: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, experts_implementation="eager"
    )
    theirs = reference.eval()(TOKENS).logits
    return float((model.logits(hidden) - theirs).abs().max() / theirs.abs().max())


def scaling(value: dict | None, place: str = "rope_scaling") -> Callable[[dict], object]:
    return lambda config: config.update({place: value})


YARN = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CHANGES_NOTHING: dict[str, Callable[[dict], object]] = {
    "null": scaling(None),
    "empty": scaling({}),
    "default": scaling({"rope_type": "default"}),
    "default in its older spelling": scaling({"type": "default"}),
    "default with a factor": scaling({"type": "default", "factor": 1}),
    "linear": scaling({"type": "linear", "factor": 1.0}),
    "linear in both spellings": scaling({"type": "linear", "rope_type": "linear", "factor": 1}),
    "dynamic": scaling({"rope_type": "dynamic", "factor": 1.0}),
    "yarn": scaling(YARN),
    "yarn with mscale": scaling(YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "attention_factor": 1.0}),
    "llama3": scaling({"rope_type": "llama3", "factor": 1.0} | LLAMA3),
    "linear in rope_parameters": lambda config: config["rope_parameters"].update(rope_type="linear", factor=1.0),
    "the whole of each head turns": lambda config: config.update(partial_rotary_factor=1.0),
    "no rope_parameters": lambda config: config.pop("rope_parameters"),
    "not quantized": lambda config: config.update(quantization_config=None),
    "precisions": lambda config: config.update(torch_dtype="float16", dtype="bfloat16"),
    "swish": lambda config: config.update(hidden_act="swish"),
    "a window that is switched off": lambda config: config.update(use_sliding_window=False, sliding_window=4),
    "a window as wide as the context": lambda config: config.update(use_sliding_window=True, sliding_window=96),
    "no window": lambda config: config.update(use_sliding_window=True, sliding_window=None),
    "full attention": lambda config: config.update(layer_types=["full_attention"] * 2, max_window_layers=1),
    "every layer has experts": lambda config: config.update(mlp_only_layers=None, decoder_sparse_step=1),
    "a layer beyond the last": lambda config: config.update(mlp_only_layers=[2, 47]),
    "width of dense layers": lambda config: config.update(intermediate_size=5),
    "dropout": lambda config: config.update(attention_dropout=0.1),
    "figures of training": lambda config: config.update(output_router_logits=True, router_aux_loss_coef=0.5),
    "the number of experts under both names": lambda config: config.update(num_local_experts=4),
    "unknown": lambda config: config.update(made_with="some other program", use_cache=False),
}


@pytest.mark.parametrize("what", CHANGES_NOTHING)
def test_qwen3_moe_settings_that_change_nothing_come_in_and_compute_what_transformers_computes(
    publish: Callable[..., Path], what: str
) -> None:
    assert distance_from_transformers(publish("qwen3_moe", CHANGES_NOTHING[what])) < 1e-5


DBRX_CHANGES_NOTHING: dict[str, Callable[[dict], object]] = {
    "null": scaling(None),
    "default": scaling({"rope_type": "default", "rope_theta": 2000.0}),
    "linear": scaling({"type": "linear", "factor": 1.0, "rope_theta": 2000.0}),
    "the base at the top": lambda config: config.update(rope_theta=2000.0),
    "dropout": lambda config: (
        config.update(resid_pdrop=0.1, emb_pdrop=0.2),
        config["attn_config"].update(attn_pdrop=0.3),
    ),
    "swish": lambda config: config["ffn_config"].update(ffn_act_fn={"name": "swish"}),
    "no activation": lambda config: config["ffn_config"].update(ffn_act_fn=None),
    "activation without a name": lambda config: config["ffn_config"].update(ffn_act_fn={}),
    "jitter": lambda config: config["ffn_config"].update(moe_jitter_eps=0.01, moe_loss_weight=0.7),
    "another width of the experts": lambda config: config["ffn_config"].update(hidden_size=7),
    "experts are chosen": lambda config: config["ffn_config"].update(uniform_expert_assignment=False),
    "head size": lambda config: config.update(head_dim=8),
    "names of other layouts": lambda config: config.update(
        hidden_size=config["d_model"], num_hidden_layers=config.pop("n_layers"), max_position_embeddings=96
    ),
    "not quantized": lambda config: config.update(quantization_config=None, torch_dtype="bfloat16"),
}


@pytest.mark.parametrize("what", DBRX_CHANGES_NOTHING)
def test_dbrx_settings_that_change_nothing_come_in_and_compute_what_transformers_computes(
    publish: Callable[..., Path], what: str
) -> None:
    assert distance_from_transformers(publish("dbrx", DBRX_CHANGES_NOTHING[what])) < 1e-5


# Our field -> the attribute of transformers' configuration that means the same.
SAME = {
    "qwen3_moe": {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "kv_n_heads": "num_key_value_heads",
        "max_seq_len": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "norm_eps": "rms_norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
        "ffn_hidden_size": "moe_intermediate_size",
        "moe_num_experts": "num_experts",
        "moe_top_k": "num_experts_per_tok",
        "moe_loss_weight": "router_aux_loss_coef",
        "initializer_range": "initializer_range",
    },
    "dbrx": {
        **{name: name for name in ("d_model", "n_layers", "n_heads", "max_seq_len", "vocab_size", "initializer_range")},
        "kv_n_heads": "attn_config.kv_n_heads",
        "clip_qkv": "attn_config.clip_qkv",
        **{
            name: f"ffn_config.{name}"
            for name in ("ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_loss_weight")
        },
        "moe_normalize_expert_weights": "ffn_config.moe_normalize_expert_weights",
    },
}


def of(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return value


@pytest.mark.parametrize(("layout", "field"), [(layout, field) for layout, same in SAME.items() for field in same])
def test_an_absent_key_has_the_default_of_transformers(publish: Callable[..., Path], layout: str, field: str) -> None:
    config = json.loads((publish(layout) / "config.json").read_text())
    *outer, last = SAME[layout][field].split(".")
    keys = of(config, outer[0]) if outer else config
    del keys[last]
    if last in ("moe_num_experts", "num_experts"):  # as many as are chosen, or it would be no model
        keys["moe_top_k" if outer else "num_experts_per_tok"] = 1
    if last == "num_experts_per_tok":
        keys["num_experts"] = 8
    if last in ("hidden_size", "num_attention_heads"):
        config["num_key_value_heads"] = 1
    theirs = CLASSES[layout](**json.loads(json.dumps(config)))
    assert getattr(LAYOUTS[layout].from_json(config), field) == of(theirs, SAME[layout][field])


def test_without_any_rotary_base_transformers_default_is_used(publish: Callable[..., Path]) -> None:
    folder = publish(
        "qwen3_moe", lambda config: (config.pop("rope_theta"), config.pop("rope_parameters")), rope_theta=1e4
    )
    assert read_published(folder)[0].rope_theta == 10000.0
    assert distance_from_transformers(folder) < 1e-5


def other_values(value: Any) -> list[Any]:
    """Some that differ from it, of its own type first."""
    match value:
        case bool():
            return [not value, "true"]
        case int() | float():
            return [value + 1, 0, None, str(value)]
        case str():
            return ["gelu", None]
        case list() | dict():
            return [{"rope_theta": 3.0}, None]
        case _:
            return [True, 3, "x"]


def refusal(folder: Path) -> str | None:
    try:
        read_published(folder)
    except InputError as refused:
        return str(refused)
    return None


def theirs_if_any(folder: Path) -> float | None:
    """The distance from transformers; None where it cannot open the directory or compute with it."""
    try:
        return distance_from_transformers(folder)
    except Exception:
        return None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_key_of_transformers_configuration_is_refused_or_computes_what_transformers_computes(
    publish: Callable[..., Path], layout: str
) -> None:
    folder = publish(layout)
    published = json.loads((folder / "config.json").read_text())
    known = CLASSES[layout](**json.loads(json.dumps(published))).to_dict() | published
    sections = {"": known} | {name: of(known, name) for name in ("attn_config", "ffn_config") if name in known}
    # Without rope_parameters, transformers turns DBRX by 10000, whatever base attn_config gives; here that base counts.
    not_compared = {"model_type", "architectures", *sections} | ({"rope_parameters"} if layout == "dbrx" else set())
    accepted = 0
    for section, keys in sections.items():
        for key in keys.keys() - not_compared:
            for value in other_values(keys[key]):
                config = json.loads(json.dumps(published))
                (config[section] if section else config)[key] = value
                (folder / "config.json").write_text(json.dumps(config))
                if refusal(folder) is None and (distance := theirs_if_any(folder)) is not None:
                    assert distance < 1e-5, (section, key, value)
                    accepted += 1
    assert accepted > 40


REFUSED = {
    "a scaled rotation": (scaling({"rope_type": "linear", "factor": 2.0}), "rope_scaling="),
    "a rotation that grows": (scaling({"rope_type": "yarn", "factor": 4.0}), "rope_scaling="),
    "NaN as a factor": (scaling({"rope_type": "linear", "factor": float("nan")}), "rope_scaling="),
    "no factor": (scaling({"rope_type": "linear"}), "rope_scaling="),
    "a default with a factor": (scaling({"factor": 4.0}, "rope_parameters"), "rope_parameters="),
    "an attention factor": (scaling(YARN | {"attention_factor": 1.2}), "attention_factor"),
    "an unknown kind": (scaling({"rope_type": "su", "factor": 1.0}), "rope_scaling="),
    "an unknown part": (scaling({"type": "default", "mrope_section": [1, 2]}), "mrope_section"),
    "a text for a scaling": (scaling("linear"), "rope_scaling='linear' must be an object"),  # type: ignore[arg-type]
    "half of each head turns": (lambda c: c.update(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "another base beside it": (lambda c: c.update(rope_theta=5.0), "two rotary bases"),
    "a base that transformers does not see": (
        lambda c: (c.pop("rope_theta"), c.update(rope_scaling={"rope_type": "default"})),
        "two rotary bases",
    ),
    "a text for a number": (lambda c: c.update(hidden_size="32"), "hidden_size='32' must be a whole number"),
    "a fraction": (lambda c: c.update(num_experts=4.0), "num_experts=4.0 must be a whole number"),
    "true for a number": (lambda c: c.update(num_hidden_layers=True), "num_hidden_layers=True must be a whole number"),
    "null for a number": (lambda c: c.update(num_key_value_heads=None), "num_key_value_heads=None must be a whole"),
    "a text for a rate": (lambda c: c.update(rope_theta="2000"), "rope_theta='2000' must be a number"),
    "a text for a switch": (lambda c: c.update(norm_topk_prob="false"), "norm_topk_prob='false' must be true or false"),
    "two numbers of experts": (lambda c: c.update(num_local_experts=8), "num_experts=4 and num_local_experts=8"),
    "a huge number": (lambda c: c.update(hidden_size=10**30), r"has shape \(384, 32\)"),
    "a billion experts": (lambda c: c.update(num_experts=10**9), "1,000,000,000 experts"),
    "a bias": (lambda c: c.update(attention_bias=True), "attention_bias=True"),
    "a window": (lambda c: c.update(use_sliding_window=True, sliding_window=8), "sliding_window=8"),
    "sliding layers": (lambda c: c.update(layer_types=["sliding_attention"] * 2), "layer_types="),
    "a dense layer": (lambda c: c.update(mlp_only_layers=[1]), r"mlp_only_layers=\[1\]"),
    "a layer of another kind": (lambda c: c.update(per_layer_config={"1": {"num_experts": 2}}), "per_layer_config="),
    "all is dropped": (lambda c: c.update(attention_dropout=1.0), "attention_dropout=1.0"),
    "another activation": (lambda c: c.update(hidden_act="gelu"), "hidden_act='gelu'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_setting_that_would_change_the_model_is_refused_by_its_name(publish: Callable[..., Path], what: str) -> None:
    change, says = REFUSED[what]
    with pytest.raises(InputError, match=says) as refused:
        read_published(publish("qwen3_moe", change))
    assert "\n" not in str(refused.value)


def test_a_key_that_is_there_twice_with_different_values_is_refused(publish: Callable[..., Path]) -> None:
    file = publish("qwen3_moe") / "config.json"
    text = file.read_text()
    file.write_text(text.replace("{", '{"num_experts_per_tok": 2, ', 1))
    assert read_published(file.parent)[0].moe_top_k == 2
    file.write_text(text.replace("{", '{"num_experts_per_tok": 1, ', 1))
    with pytest.raises(RuntimeError, match="'num_experts_per_tok' is there twice"):
        read_published(file.parent)


# ---- buffers that only repeat the configuration --------------------------------------------------------

FREQUENCIES = {
    "dbrx": ["transformer.rotary_emb.inv_freq", "transformer.blocks.1.norm_attn_norm.attn.rotary_emb.inv_freq"],
    "qwen3_moe": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored_rotary_frequencies_are_left_out_when_they_are_those_of_the_base(
    publish: Callable[..., Path], tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    folder = publish(layout)
    cfg, weights = read_published(folder)
    tensors, C = load_file(folder / SINGLE), cfg.head_dim
    frequencies = 1.0 / (cfg.rope_theta ** (torch.arange(0, C, 2, dtype=torch.float) / C))  # as transformers does
    stored = {name: frequencies.to(dtype).clone() for name in FREQUENCIES[layout]}
    save_file(tensors | stored, folder / SINGLE, {"format": "pt"})
    assert read_published(folder)[1].keys() == weights.keys()
    assert distance_from_transformers(folder) < 1e-5
    import_model(folder, tmp_path / "ours")
    for wrong in (frequencies * 1.05, frequencies[:-1], torch.full_like(frequencies, torch.nan)):
        save_file(tensors | {FREQUENCIES[layout][0]: wrong.to(dtype).contiguous()}, folder / SINGLE)
        with pytest.raises(InputError, match="holds other rotary frequencies"):
            read_published(folder)


def test_a_dropout_is_named_when_it_is_left_out(
    publish: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish("qwen3_moe", lambda config: config.update(attention_dropout=0.25))
    import_model(folder, tmp_path / "ours")
    assert "attention_dropout=0.25 is left out" in capsys.readouterr().err
