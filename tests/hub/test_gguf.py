"""The file is read back by the `gguf` package, tensor by tensor; llama.cpp, where it is installed, runs it."""

import json
import unicodedata
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from gristmill.errors import Failure, InputError
from gristmill.hub import Weight, in_memory
from gristmill.hub.gguf import QWEN_SPLIT, find_graph, gguf_tensors, write_gguf
from gristmill.hub.mapping import from_published, to_published
from gristmill.model import ModelConfig, Transformer, init_weights, packed
from gristmill.tokenizer import Tokenizer, hugging_face_config
from gristmill.tokenizer.layout import CHAT_TEMPLATE, SPECIAL_TOKENS, SPLIT_PATTERN, byte_of_symbol

Tiny = Callable[..., Transformer]
QWEN = {"norm": "rms_norm", "norm_eps": 1e-6, "qk_norm": True, "clip_qkv": None, "head_size": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "dbrx": {"clip_qkv": 0.5},
    "dbrx_unclipped_wide_eps": {"clip_qkv": None, "norm_eps": 0.1, "kv_n_heads": 1, "rope_theta": 500000.0},
    "dbrx_16_choose_4": {"moe_num_experts": 16, "moe_top_k": 4},
    "dbrx_dense": {"ffn": "dense"},
    "dbrx_tied": {"tie_word_embeddings": True},
    "qwen3moe": QWEN,
    "qwen3moe_tied": {**QWEN, "tie_word_embeddings": True, "moe_num_experts": 32, "moe_top_k": 8},
    "qwen3moe_dense": {**QWEN, "ffn": "dense"},
}
CONTEXT = 256  # what llama.cpp rounds a smaller one up to


def write(model: Transformer, tokenizer: Path, file: Path, dtype: torch.dtype | str | None = None) -> Path:
    write_gguf(file, model.cfg, in_memory(model.state_dict()), tokenizer, name="tiny", license="mit", dtype=dtype)
    return file


def read(file: Path) -> dict[str, tuple[str, Tensor]]:
    """name -> (type, values), the dimensions as numpy has them."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        shape = [int(size) for size in tensor.shape[::-1]]
        values = torch.from_numpy(np.array(tensor.data))
        if tensor.tensor_type.name == "BF16":  # the reader gives bytes
            values = values.view(torch.bfloat16)
        assert list(values.shape) == shape
        found[tensor.name] = (tensor.tensor_type.name, values)
    return found


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("changes", [{}, QWEN | {"n_heads": 2, "head_size": 32}])
def test_blocks_are_those_of_a_plain_loop(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, dtype: str, changes: dict[str, Any]
) -> None:
    model = tiny(**changes, ffn_hidden_size=64)
    file = write(model, tokenizer_dir, tmp_path / "tiny.gguf", dtype)
    table = gguf_tensors(*find_graph(model.cfg))
    plain = to_published(table, in_memory(model.state_dict()))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert found.keys() == plain.keys()
    for name, weight in plain.items():
        kind, numbers = found[name].tensor_type.name, weight.load().detach().numpy()
        if "norm" in name or "ffn_gate_inp" in name:
            assert kind == "F32"
            assert np.array_equal(found[name].data, numbers)
            continue
        wanted = "Q8_0" if name in ("token_embd.weight", "output.weight") else dtype.upper()
        assert kind == wanted
        blocks = b"".join(block_of(block, kind) for block in numbers.reshape(-1, 32))
        assert found[name].data.tobytes() == blocks


def block_of(numbers: np.ndarray[Any, np.dtype[np.float32]], kind: str) -> bytes:
    """The 32 numbers' fp16 scale and codes, as ggml-quants.c describes its reference."""
    largest = numbers[np.abs(numbers).argmax()]
    scale = abs(largest) / np.float32(127) if kind == "Q8_0" else largest / np.float32(-8)
    inverse = np.float32(1) / scale if scale else np.float32(0)
    scaled = numbers * inverse
    if kind == "Q8_0":
        codes = (np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))).astype(np.int8)
        return np.float16(scale).tobytes() + codes.tobytes()
    codes = np.minimum(15, np.floor(scaled + np.float32(8.5))).astype(np.uint8)
    return np.float16(scale).tobytes() + (codes[:16] | codes[16:] << 4).tobytes()


def test_rows_that_blocks_do_not_divide_are_refused(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ffn_down_exps.weight has 24 inputs, and Q8_0 wants a multiple of 32"):
        write(tiny(), tokenizer_dir, tmp_path / "tiny.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


# ---- read back by the package --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_of_the_file_is_ours(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    model = tiny(**SHAPES[name])
    cfg, state = model.cfg, model.state_dict()
    wanted = {"token_embd": state["wte.weight"], "output_norm": state["norm_f.weight"]}
    if name != "qwen3moe_tied":
        wanted["output"] = model.output_weight.data
    for i in range(cfg.n_layers):
        block = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items()}
        made = {"attn_norm": block["norm_1.weight"], "attn_output": block["attn.out_proj.weight"]}
        if name.startswith("dbrx"):
            made |= {"attn_qkv": block["attn.Wqkv.weight"], "attn_output_norm": block["norm_2.weight"]}
        else:
            parts = block["attn.Wqkv.weight"].split((64, 32, 32))
            made |= dict(zip(("attn_q", "attn_k", "attn_v"), parts, strict=True))
            made |= {"attn_q_norm": block["attn.q_norm.weight"], "attn_k_norm": block["attn.k_norm.weight"]}
            made["ffn_norm"] = block["norm_2.weight"]
        if cfg.ffn == "dense":
            gate, up, down = (block[f"ffn.{w}"][None] for w in ("w1", "v1", "w2"))
            router = torch.zeros(1, cfg.d_model)
        else:
            gate, up, down = (block[f"ffn.experts.{w}"] for w in ("w1", "v1", "w2"))
            router = block["ffn.router.weight"]
        made |= {"ffn_gate_inp": router, "ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": down.mT}
        wanted |= {f"blk.{i}.{key}": value for key, value in made.items()}
    given = read(write(model, tokenizer_dir, tmp_path / "tiny.gguf"))
    assert given.keys() == {f"{key}.weight" for key in wanted}
    for key, value in wanted.items():
        kind, found = given[f"{key}.weight"]
        assert kind == "F32"
        assert torch.equal(found, value), key


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16"), (None, "BF16")]
)
def test_matrices_take_the_dtype_and_norms_and_routers_stay_float32(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, dtype: torch.dtype | None, name: str
) -> None:
    model = tiny(**QWEN)
    weights = in_memory(model.state_dict())
    if dtype is None:  # that of most weights
        weights = {key: weight if "norm" in key else weight.to(torch.bfloat16) for key, weight in weights.items()}
    write_gguf(tmp_path / "tiny.gguf", model.cfg, weights, tokenizer_dir, name="tiny", dtype=dtype)
    given = read(tmp_path / "tiny.gguf")
    for key, (kind, _) in given.items():
        assert kind == ("F32" if "norm" in key or "ffn_gate_inp" in key else name), key
    down = model.blocks[0].ffn.experts.w2.data.mT  # type: ignore[union-attr]
    assert torch.equal(given["blk.0.ffn_down_exps.weight"][1], down.to(dtype or torch.bfloat16))
    wanted = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}
    assert fields(tmp_path / "tiny.gguf")["general.file_type"] == wanted.get(name, gguf.LlamaFileType.MOSTLY_BF16)


def test_dbrx_metadata_says_what_the_configuration_says(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    found = fields(write(tiny(clip_qkv=0.5), tokenizer_dir, tmp_path / "tiny.gguf"))
    assert {key: value for key, value in found.items() if not key.startswith(("GGUF.", "tokenizer."))} == {
        "general.architecture": "dbrx",
        "general.type": "model",
        "general.name": "tiny",
        "general.license": "mit",
        "general.size_label": "4x36K",
        "general.file_type": 0,
        "dbrx.context_length": 96,
        "dbrx.embedding_length": 32,
        "dbrx.block_count": 2,
        "dbrx.attention.head_count": 4,
        "dbrx.attention.head_count_kv": 2,
        "dbrx.attention.clamp_kqv": 0.5,
        "dbrx.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "dbrx.rope.freq_base": 2000.0,
        "dbrx.feed_forward_length": 24,
        "dbrx.expert_count": 4,
        "dbrx.expert_used_count": 2,
    }


def test_qwen3moe_metadata_says_what_the_configuration_says(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    model = tiny(**QWEN)
    write_gguf(tmp_path / "a.gguf", model.cfg, in_memory(model.state_dict()), tokenizer_dir, name="q")
    found = fields(tmp_path / "a.gguf")
    assert found["general.architecture"] == "qwen3moe"
    assert "general.license" not in found
    assert {key: value for key, value in found.items() if key.startswith("qwen3moe.")} == {
        "qwen3moe.context_length": 96,
        "qwen3moe.embedding_length": 32,
        "qwen3moe.block_count": 2,
        "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 16,
        "qwen3moe.attention.value_length": 16,
        "qwen3moe.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen3moe.rope.freq_base": 2000.0,
        "qwen3moe.feed_forward_length": 24,
        "qwen3moe.expert_feed_forward_length": 24,
        "qwen3moe.expert_count": 4,
        "qwen3moe.expert_used_count": 2,
    }


def test_the_vocabulary_names_every_row_of_the_embedding(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    found = fields(write(tiny(), tokenizer_dir, tmp_path / "tiny.gguf"))
    tokenizer, parsed = Tokenizer.load(tokenizer_dir), json.loads((tokenizer_dir / "tokenizer.json").read_text())
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "dbrx"
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    first = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    symbols = byte_of_symbol()
    for id in range(first):
        assert bytes(symbols[c] for c in tokens[id]) == tokenizer.decode_bytes([id])
    assert tokens[first : tokenizer.vocab_size] == list(SPECIAL_TOKENS)
    assert tokens[tokenizer.vocab_size :] == [f"[PAD{id}]" for id in range(tokenizer.vocab_size, 384)]
    kinds = gguf.TokenType
    assert types == [kinds.NORMAL] * first + [kinds.CONTROL] * 8 + [kinds.UNUSED] * (384 - tokenizer.vocab_size)
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in parsed["model"]["merges"]]
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == tokenizer.eot_id
    assert found["tokenizer.ggml.padding_token_id"] == tokenizer.pad_id
    assert found["tokenizer.ggml.eot_token_id"] == tokenizer.im_end_id
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_the_same_input_gives_the_same_bytes(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    model = tiny(**QWEN)
    write(model, tokenizer_dir, tmp_path / "a.gguf")
    reordered = in_memory(dict(reversed(model.state_dict().items())))
    write_gguf(tmp_path / "b.gguf", model.cfg, reordered, tokenizer_dir, name="tiny", license="mit")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_one_of_our_tensors_is_alive_at_a_time(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    model = tiny(**QWEN)
    loaded: list[weakref.ref[Tensor]] = []

    def lazily(tensor: Tensor) -> Weight:
        def load() -> Tensor:
            assert not [ref for ref in loaded if ref() is not None]
            loaded.append(weakref.ref(copy := tensor.clone()))
            return copy

        return replace(Weight.of(tensor), load=load)

    weights = {name: lazily(tensor) for name, tensor in model.state_dict().items()}
    write_gguf(tmp_path / "tiny.gguf", model.cfg, weights, tokenizer_dir, name="tiny")
    assert len(loaded) >= len(weights)


@pytest.mark.parametrize("name", ["dbrx", "qwen3moe", "qwen3moe_tied"])
def test_the_table_reads_back_what_it_writes(tiny: Tiny, name: str) -> None:
    model = tiny(**SHAPES[name])
    table = gguf_tensors(*find_graph(model.cfg))
    back = from_published(model.cfg, table, to_published(table, in_memory(model.state_dict())))
    for key, tensor in model.state_dict().items():
        assert torch.equal(back[key].load(), tensor), key


def test_the_published_dbrx_has_the_shapes_that_llama_cpp_asks_for() -> None:
    table = gguf_tensors(*find_graph(ModelConfig(vocab_size=100352)))
    parts = {piece.name: piece.shape[::-1] for pieces in table.values() for piece in pieces}
    assert len(parts) == 3 + 40 * 8
    assert parts["token_embd.weight"] == parts["output.weight"] == (6144, 100352)
    assert parts["blk.39.attn_qkv.weight"] == (6144, 8192)
    assert parts["blk.39.ffn_gate_exps.weight"] == parts["blk.39.ffn_up_exps.weight"] == (6144, 10752, 16)
    assert parts["blk.39.ffn_down_exps.weight"] == (10752, 6144, 16)
    assert parts["blk.39.ffn_gate_inp.weight"] == (6144, 16)
    assert sum(np.prod(shape, dtype=np.int64) for shape in parts.values()) == 131_596_523_520


# ---- what cannot be written ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe_normalize_expert_weights": 2.0}, "moe_normalize_expert_weights=2.0 cannot be said in GGUF"),
        ({**QWEN, "moe_normalize_expert_weights": None}, "moe_normalize_expert_weights=None cannot be said in GGUF"),
        ({"head_size": 16}, "head_size=16"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({**QWEN, "qk_norm": False}, "qk_norm=False"),
        ({**QWEN, "clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"moe_num_experts": 1025}, "moe_num_experts=1025"),
    ],
)
def test_a_shape_that_llama_cpp_does_not_compute_is_refused(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        write(tiny(**changes), tokenizer_dir, tmp_path / "tiny.gguf")
    assert not list(tmp_path.iterdir())


def test_values_beyond_float16_are_refused_and_leave_no_file(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    model = tiny()
    model.lm_head.weight.data[3, 4] = 70000.0
    with pytest.raises(InputError, match="holds values that float16 cannot"):
        write(model, tokenizer_dir, tmp_path / "tiny.gguf", torch.float16)
    with pytest.raises(InputError, match="float64 is not written to GGUF"):
        write(model, tokenizer_dir, tmp_path / "tiny.gguf", torch.float64)
    assert not list(tmp_path.iterdir())


def edit(source: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    parsed = json.loads((source / "tokenizer.json").read_text())
    change(parsed)
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(parsed))
    (out / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return out


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0), InputError, "splits text"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), InputError, "splits text"),
        (lambda t: t.update(pre_tokenizer=None), InputError, "splits text"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), InputError, "normalizes text by Lowercase"),
        (lambda t: t["model"]["vocab"].update(a=384), InputError, "ids up to 384; the model has vocab_size=384"),
        (lambda t: t["added_tokens"][7].update(content="[PAD383]"), InputError, r"a token '\[PAD383\]'"),
        (lambda t: t["added_tokens"][5].update(content="<pad>"), InputError, r"pad_token would be '<\|pad\|>'"),
        (lambda t: t["model"]["vocab"].update({"▁the": 350}), Failure, "not byte-level"),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), Failure, "where words begin or end"),
        (lambda t: t["model"].pop("merges"), Failure, "not a byte-level BPE"),
        (lambda t: t["model"].update(vocab=None), Failure, "not a byte-level BPE"),
        (lambda t: t["model"]["vocab"].update(a=-1), Failure, "not a byte-level BPE: .* id -1"),
        (lambda t: t["model"]["vocab"].update(a=1.5), Failure, "not a byte-level BPE"),
        (lambda t: t["model"]["merges"].append([1, 2]), Failure, "not a byte-level BPE"),
        (lambda t: t["added_tokens"][0].pop("special"), Failure, "not a byte-level BPE: KeyError.'special'"),
        (lambda t: t["added_tokens"][1].update(content=5), Failure, "not a byte-level BPE"),
        (lambda t: t["added_tokens"][1].update(content="\ud800"), Failure, "not a byte-level BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_misread_is_refused(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, change: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        write(tiny(), edit(tokenizer_dir, tmp_path / "tokenizer", change), tmp_path / "tiny.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": {"special": True}},
        {"bos_token": ["<|endoftext|>"]},
        {"chat_template": 5},
        {"chat_template": ["{{ messages }}"]},
        {"chat_template": [{"name": "default", "template": 5}]},
        {"chat_template": [{"name": 5, "template": "{{ messages }}"}]},
        {"chat_template": "\udc00"},
    ],
)
def test_damaged_settings_of_a_tokenizer_are_one_line_and_leave_no_file(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = edit(tokenizer_dir, tmp_path / "tokenizer", lambda t: None)
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_config() | settings))
    with pytest.raises(Failure, match=r"^[^\n]*tokenizer is not a byte-level BPE: [^\n]*; fetch or build it again$"):
        write(tiny(), folder, tmp_path / "tiny.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer"]


def test_several_chat_templates_are_kept(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = edit(tokenizer_dir, tmp_path / "tokenizer", lambda t: None)
    several = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_config() | {"chat_template": several}))
    found = fields(write(tiny(), folder, tmp_path / "tiny.gguf"))
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_files_beside_it_stay_and_others_may_read_it_as_any_new_file(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path
) -> None:
    beside = [tmp_path / "tiny.gguf.partial", tmp_path / ".tiny.gguf.partial"]
    for file in beside:
        file.write_text("mine")
    written = write(tiny(), tokenizer_dir, tmp_path / "tiny.gguf")
    assert written.stat().st_mode == beside[0].stat().st_mode
    assert sorted(tmp_path.iterdir()) == sorted([*beside, written])
    assert {file.read_text() for file in beside} == {"mine"}


def test_a_folder_without_a_tokenizer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a tokenizer: it has no tokenizer\.json"):
        write(tiny(), tmp_path, tmp_path / "tiny.gguf")


def test_each_split_has_its_name_in_llama_cpp(tiny: Tiny, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Qwen's as published, with its normalizer; GPT-4's also where a piece that is a token needs no merges."""
    qwen = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )

    def as_qwen(parsed: dict[str, Any]) -> None:
        parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = qwen
        parsed["normalizer"] = {"type": "NFC"}

    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "qwen2": as_qwen,
        "llama-bpe": lambda t: t["model"].update(ignore_merges=True),
        "dbrx": lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed", invert=True),
    }
    for name, change in changes.items():
        tokenizer = edit(tokenizer_dir, tmp_path / name, change)
        assert fields(write(tiny(), tokenizer, tmp_path / "tiny.gguf"))["tokenizer.ggml.pre"] == name


def test_an_added_token_that_is_not_special_is_text_to_llama_cpp_too(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = edit(tokenizer_dir, tmp_path / "t", lambda t: t["added_tokens"][1].update(content="<x>", special=False))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": None, "eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = fields(write(tiny(), folder, tmp_path / "tiny.gguf"))
    id = found["tokenizer.ggml.tokens"].index("<x>")
    assert found["tokenizer.ggml.token_type"][id] == gguf.TokenType.USER_DEFINED
    assert found["tokenizer.ggml.tokens"][found["tokenizer.ggml.bos_token_id"]] == "<|endoftext|>"
    assert found["tokenizer.ggml.tokens"][found["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert "tokenizer.ggml.padding_token_id" not in found
    assert found["tokenizer.chat_template"] == "{{ messages }}"


# ---- run by llama.cpp ----------------------------------------------------------------------------------


def running(llama_cpp: ModuleType, file: Path, vocab_only: bool = False) -> AbstractContextManager[Any]:
    """The file in llama.cpp, which keeps all logits, and keys and values in float32."""
    model = llama_cpp.Llama(
        str(file),
        vocab_only=vocab_only,
        n_ctx=CONTEXT,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    return closing(model)


def logits(model: Transformer, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        return model.logits(model(tokens, torch.arange(len(ids))[None], packed(torch.zeros_like(tokens)))[0])[0]


def theirs(model: Any, ids: list[int]) -> Tensor:
    model.reset()
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(292, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_gives_our_logits_and_greedy_tokens(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, llama_cpp: ModuleType, name: str
) -> None:
    model = tiny(**SHAPES[name], max_seq_len=CONTEXT)
    file = write(model, tokenizer_dir, tmp_path / "tiny.gguf")
    with running(llama_cpp, file) as loaded:
        ids = random_ids(CONTEXT, 1)
        wanted = theirs(loaded, ids)
        assert (logits(model, ids) - wanted).abs().max() <= 2e-5 * wanted.abs().max()
        for seed, length in ((2, 1), (3, 5), (4, 60)):
            made = random_ids(length, seed)
            best_two = [theirs(loaded, made)[-1].topk(2)]
            for _ in range(31):
                made.append(int(best_two[-1].indices[0]))
                loaded.eval(made[-1:])
                best_two.append(torch.tensor(loaded.scores[loaded.n_tokens - 1]).topk(2))
            ours = logits(model, made)[length - 1 :].argmax(-1)
            for mine, (values, indices) in zip(ours.tolist(), best_two, strict=True):
                if mine != indices[0]:
                    assert values[0] - values[1] < 1e-5  # a tie: from here on the two may go different ways
                    break


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dbrx", "qwen3moe"])
def test_llama_cpp_computes_nearly_the_same_from_half_precision(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, llama_cpp: ModuleType, name: str, dtype: torch.dtype
) -> None:
    model = tiny(**SHAPES[name], max_seq_len=CONTEXT)
    ids = random_ids(64, 1)
    with running(llama_cpp, write(model, tokenizer_dir, tmp_path / "tiny.gguf", dtype)) as loaded:
        differences = (logits(model, ids) - theirs(loaded, ids)).abs()
    assert differences.median() <= 4 * torch.finfo(dtype).eps  # where another expert is chosen, it is much more


CORNERS = "stdmlrveSTx'1٣中é \n\r\t!._🙂\u00a0\u0085\u2028\u200b\u3000"
ASSIGNED_LONG_AGO = st.characters(exclude_categories=["Cs"]).filter(
    lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn" and c != "\u017f"
)
TEXTS = st.text(st.sampled_from(CORNERS) | ASSIGNED_LONG_AGO, max_size=40)


@pytest.fixture(scope="module", params=["dbrx", "qwen2", "llama-bpe"])
def corner_case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_cpp: ModuleType
) -> Iterator[tuple[Tokenizer, Any]]:
    """A tokenizer whose merges cross every border at which a split could go wrong, ours and in llama.cpp."""
    split = {"qwen2": QWEN_SPLIT}.get(request.param, SPLIT_PATTERN)
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=request.param == "llama-bpe"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=sorted(alphabet), show_progress=False)
    random = np.random.default_rng(0)
    bpe.train_from_iterator(["".join(random.choice(list(CORNERS), 60)) for _ in range(500)], trainer)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated"), bpe.pre_tokenizer]
    )
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_config()))
    tokenizer = Tokenizer.load(folder)
    small = {"d_model": 2, "n_layers": 1, "n_heads": 1, "kv_n_heads": 1, "ffn_hidden_size": 1, "moe_num_experts": 4}
    model = init_weights(Transformer(ModelConfig(**small, vocab_size=tokenizer.vocab_size)), seed=0)
    file = write(model, folder, folder / "tiny.gguf")
    with running(llama_cpp, file, vocab_only=True) as loaded:
        yield tokenizer, loaded


@given(text=TEXTS)
def test_llama_cpp_gives_our_ids_and_our_bytes_back(corner_case: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, loaded = corner_case
    ids = loaded.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == tokenizer.encode(text)
    assert loaded.detokenize(ids) == text.encode()


def test_llama_cpp_knows_what_ends_a_text_and_a_turn(
    tiny: Tiny, tokenizer_dir: Path, tmp_path: Path, llama_cpp: ModuleType
) -> None:
    tokenizer = Tokenizer.load(tokenizer_dir)
    messages = [{"role": "system", "content": "Grind."}, {"role": "user", "content": "Körner?\n"}]
    with running(llama_cpp, write(tiny(), tokenizer_dir, tmp_path / "tiny.gguf"), vocab_only=True) as loaded:
        vocab = loaded._model.vocab
        ends = [id for id in range(loaded.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, id)]
        assert ends == [tokenizer.eot_id, tokenizer.im_end_id]
        assert loaded.token_bos() == loaded.token_eos() == tokenizer.eot_id
        assert llama_cpp.llama_vocab_get_add_bos(vocab)
        assert loaded.tokenize(b"<|im_end|>", special=False) == tokenizer.encode_prompt("<|im_end|>")
        template = loaded.metadata["tokenizer.chat_template"]
        chat = import_module("llama_cpp.llama_chat_format").Jinja2ChatFormatter(template, eos_token="", bos_token="")
        prompt = chat(messages=messages).prompt
        ids = loaded.tokenize(prompt.encode(), add_bos=False, special=True)
        assert ids == tokenizer.chat(messages, generation_prompt=True)
