"""GGUF: the one file that llama.cpp runs, and with it Ollama, LM Studio, llama-cpp-python and others.

Two of llama.cpp's graphs compute what this model computes, `dbrx` and `qwen3moe`. What they read, and what they
cannot say, stands in its source (src/models/, src/llama-graph.cpp, src/llama-vocab.cpp); checked with commit 0c1e57098.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from gguf.constants import TENSOR_NAMES
from torch import Tensor

from gristmill.errors import Failure, InputError
from gristmill.hub.dbrx import NO_CLIP
from gristmill.hub.layout import as_one_expert, shapes
from gristmill.hub.published import main_dtype, read_json
from gristmill.hub.tensors import Weights, check_names
from gristmill.model import ModelConfig
from gristmill.progress import bar
from gristmill.tokenizer.layout import EOT, IM_END, SPLIT_PATTERN, byte_of_symbol

MAX_LAYERS = 512  # llama.cpp's tables have this size, and a larger model ends the process that loads it
MAX_EXPERTS = 1024

STORED = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}

QWEN_SPLIT = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit alone
# (split, whether a piece that is a token needs no merges) -> llama.cpp's name for it
PRE_TOKENIZERS = {
    (SPLIT_PATTERN, False): "dbrx",
    (SPLIT_PATTERN, True): "llama-bpe",
    (QWEN_SPLIT, False): "qwen2",
}


def write_gguf(
    file: Path,
    cfg: ModelConfig,
    weights: Weights,
    tokenizer: Path,
    *,
    name: str,
    license: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model and its tokenizer as one GGUF file.

    weights: under our own names. tokenizer: a directory with tokenizer.json and tokenizer_config.json. dtype: float32,
    float16 or bfloat16 for the matrices; None keeps the one that most weights have. Norm scales and routers are always
    float32. One tensor is in memory at a time; the same input gives the same bytes.

    llama.cpp keeps keys and values in float16 unless told otherwise: to compare logits, give it float32 for both.

    Raises InputError for what llama.cpp cannot say, Failure when the tokenizer is damaged.
    """
    assert cfg.vocab_size is not None
    cfg, weights = as_one_expert(cfg, weights)
    architecture = architecture_of(cfg)
    check_names(shapes(cfg), weights)
    vocabulary = read_vocabulary(tokenizer, cfg.vocab_size or 0)
    if dtype is None:
        dtype = main_dtype(weights)
        dtype = torch.float32 if dtype == torch.float64 else dtype
    if dtype not in STORED:
        raise InputError(f"dtype={dtype} is not written to GGUF; give float32, float16 or bfloat16")

    parts = parts_of(cfg)
    partial = file.with_name(f"{file.name}.partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[architecture])
    for part, shape in parts.items():
        kept = part.dtype(dtype)
        writer.add_tensor_info(part.name, shape, None, _num_bytes(shape, kept), raw_dtype=STORED[kept][0])  # type: ignore[arg-type]  # the code stands in its place
    _describe(writer, cfg, vocabulary, name=name, license=license, dtype=dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        _append_tensors(partial, writer.data_alignment, parts, weights, dtype)
        partial.replace(file)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


# ---- tensors -------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A tensor of the file: `rows` of the first dimension of one of ours, transposed or not."""

    name: str
    source: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    exact: bool = False

    def cut(self, ours: Tensor) -> Tensor:
        some = ours if self.rows is None else ours[slice(*self.rows)]
        return some.transpose(-1, -2) if self.transposed else some

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        return torch.float32 if self.exact else wanted


def architecture_of(cfg: ModelConfig) -> gguf.MODEL_ARCH:
    """Raises InputError when no graph of llama.cpp computes what this configuration says."""
    if cfg.moe_normalize_expert_weights != 1:
        raise InputError(
            f"moe_normalize_expert_weights={cfg.moe_normalize_expert_weights} cannot be said in GGUF: llama.cpp knows "
            "only 1, weights divided by their sum; export to the Hugging Face layout instead"
        )
    if cfg.n_layers > MAX_LAYERS or cfg.moe_num_experts > MAX_EXPERTS:
        raise InputError(
            f"n_layers={cfg.n_layers} and moe_num_experts={cfg.moe_num_experts} must be at most {MAX_LAYERS} and "
            f"{MAX_EXPERTS} in GGUF: llama.cpp has room for no more; export to the Hugging Face layout instead"
        )
    match cfg.norm:
        case "layer_norm" if not cfg.qk_norm and cfg.n_heads * cfg.head_dim == cfg.d_model:
            return gguf.MODEL_ARCH.DBRX
        case "rms_norm" if cfg.qk_norm and cfg.clip_qkv is None:
            return gguf.MODEL_ARCH.QWEN3MOE
        case _:
            raise InputError(
                f"norm={cfg.norm} with qk_norm={cfg.qk_norm}, clip_qkv={cfg.clip_qkv} and head_size={cfg.head_size} "
                "cannot be said in GGUF: llama.cpp's dbrx has layer_norm, no qk_norm and heads of d_model / n_heads, "
                "its qwen3moe has rms_norm, qk_norm and no clipping; export to the Hugging Face layout instead"
            )


def parts_of(cfg: ModelConfig) -> dict[Part, tuple[int, ...]]:
    """Everything in the file, in order, with its shape as torch says it: GGUF lists dimensions the other way round."""
    ours = shapes(cfg)
    with torch.device("meta"):
        return {part: tuple(part.cut(torch.empty(ours[part.source])).shape) for part in _parts(cfg)}


def _parts(cfg: ModelConfig) -> Iterator[Part]:
    kinds, is_dbrx = gguf.MODEL_TENSOR, architecture_of(cfg) == gguf.MODEL_ARCH.DBRX

    def named(kind: gguf.MODEL_TENSOR, layer: int | None = None) -> str:
        return TENSOR_NAMES[kind].format(bid=layer) + ".weight"

    yield Part(named(kinds.TOKEN_EMBD), "wte.weight")
    for i in range(cfg.n_layers):
        block = f"blocks.{i}."
        yield Part(named(kinds.ATTN_NORM, i), f"{block}norm_1.weight", exact=True)
        if is_dbrx:
            yield Part(named(kinds.ATTN_QKV, i), f"{block}attn.Wqkv.weight")
        else:
            q, kv = cfg.n_heads * cfg.head_dim, cfg.kv_n_heads * cfg.head_dim
            yield Part(named(kinds.ATTN_Q, i), f"{block}attn.Wqkv.weight", rows=(0, q))
            yield Part(named(kinds.ATTN_K, i), f"{block}attn.Wqkv.weight", rows=(q, q + kv))
            yield Part(named(kinds.ATTN_V, i), f"{block}attn.Wqkv.weight", rows=(q + kv, q + 2 * kv))
            yield Part(named(kinds.ATTN_Q_NORM, i), f"{block}attn.q_norm.weight", exact=True)
            yield Part(named(kinds.ATTN_K_NORM, i), f"{block}attn.k_norm.weight", exact=True)
        yield Part(named(kinds.ATTN_OUT, i), f"{block}attn.out_proj.weight")
        second_norm = kinds.ATTN_OUT_NORM if is_dbrx else kinds.FFN_NORM
        yield Part(named(second_norm, i), f"{block}norm_2.weight", exact=True)
        yield Part(named(kinds.FFN_GATE_INP, i), f"{block}ffn.router.weight", exact=True)
        yield Part(named(kinds.FFN_GATE_EXP, i), f"{block}ffn.experts.w1")
        yield Part(named(kinds.FFN_UP_EXP, i), f"{block}ffn.experts.v1")
        # ggml multiplies by a matrix's rows, and ours maps [F] to [D] by its columns
        yield Part(named(kinds.FFN_DOWN_EXP, i), f"{block}ffn.experts.w2", transposed=True)
    yield Part(named(kinds.OUTPUT_NORM), "norm_f.weight", exact=True)
    if not cfg.tie_word_embeddings:
        yield Part(named(kinds.OUTPUT), "lm_head.weight")
    elif is_dbrx:  # its graph wants this tensor; qwen3moe's does without
        yield Part(named(kinds.OUTPUT), "wte.weight")


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _append_tensors(
    file: Path, alignment: int, parts: Mapping[Part, tuple[int, ...]], weights: Weights, dtype: torch.dtype
) -> None:
    total = sum(_num_bytes(shape, part.dtype(dtype)) for part, shape in parts.items())
    with file.open("ab") as out, bar(f"writing {file.stem}", total) as advance:
        out.write(bytes(-out.tell() % alignment))
        for part, shape in parts.items():
            stored = torch.empty(shape, dtype=part.dtype(dtype))  # cast and transposed in one go, without a third copy
            stored.copy_(part.cut(weights[part.source].load().detach()))
            if stored.dtype == torch.float16 and not all(edge.isfinite() for edge in stored.aminmax()):
                raise InputError(f"{part.source} holds values that float16 cannot; give bfloat16 or float32")
            out.write(stored.view(-1).view(torch.uint8).numpy().data)
            out.write(bytes(-out.tell() % alignment))
            advance(stored.nbytes)


# ---- metadata ------------------------------------------------------------------------------------------


def _describe(
    writer: gguf.GGUFWriter,
    cfg: ModelConfig,
    vocabulary: "Vocabulary",
    *,
    name: str,
    license: str | None,
    dtype: torch.dtype,
) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    if license is not None:
        writer.add_license(license)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(STORED[dtype][1])

    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layers)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.kv_n_heads)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_expert_count(cfg.moe_num_experts)
    writer.add_expert_used_count(cfg.moe_top_k)
    writer.add_feed_forward_length(cfg.ffn_hidden_size)
    if architecture_of(cfg) == gguf.MODEL_ARCH.DBRX:
        writer.add_layer_norm_eps(cfg.norm_eps)
        # The key must be there. Newer versions take 0 for "none", older ones would clamp everything to 0.
        writer.add_clamp_kqv(NO_CLIP if cfg.clip_qkv is None else cfg.clip_qkv)
    else:
        writer.add_layer_norm_rms_eps(cfg.norm_eps)
        writer.add_key_length(cfg.head_dim)
        writer.add_value_length(cfg.head_dim)
        writer.add_expert_feed_forward_length(cfg.ffn_hidden_size)

    writer.add_tokenizer_model("gpt2")  # any byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    if vocabulary.pad_id is not None:
        writer.add_pad_token_id(vocabulary.pad_id)
    if vocabulary.eot_id is not None:
        writer.add_eot_token_id(vocabulary.eot_id)
    writer.add_add_bos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


# ---- the tokenizer -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer in llama.cpp's words. `pre`: how it names the split. `eos_id` ends a text, `eot_id` a chat turn."""

    pre: str
    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    bos_id: int
    eos_id: int
    pad_id: int | None
    eot_id: int | None
    chat_template: str | list[dict[str, str]] | None


def read_vocabulary(folder: Path, num_rows: int) -> Vocabulary:
    """A tokenizer directory for a model with `num_rows` ids; those that no token has are filled up.

    llama.cpp then gives the ids that `Tokenizer.encode` gives, except for text with an apostrophe before U+017F (the
    long s) or with letters or digits that Unicode added in version 16, and, where the tokenizer normalizes, for text
    that is not in NFC.

    Raises InputError when there is none, it is larger than the model, or splits text in another way than llama.cpp can.
    """
    file = folder / "tokenizer.json"
    parsed, config = read_json(file), read_json(folder / "tokenizer_config.json") or {}
    if parsed is None:
        raise InputError(f"{folder} is not a tokenizer: it has no {file.name}")
    try:
        pre = _pre_tokenizer(file, parsed)
        added = {int(token["id"]): token for token in parsed["added_tokens"]}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parsed["model"]["merges"]]
        vocab: dict[str, int] = parsed["model"]["vocab"] | {token["content"]: id for id, token in added.items()}
        if not {*"".join(token for token, id in vocab.items() if id not in added)} <= byte_of_symbol().keys():
            raise ValueError("its tokens are not byte-level")
        if parsed["model"].get("continuing_subword_prefix") or parsed["model"].get("end_of_word_suffix"):
            raise ValueError("it marks where words begin or end")
        largest = max(vocab.values())
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Failure(f"{file} is not a byte-level BPE: {problem!r}; fetch or build it again") from None
    if largest >= num_rows:
        raise InputError(f"{file} has ids up to {largest}; the model has vocab_size={num_rows}: take its own tokenizer")

    tokens, types = [f"[PAD{id}]" for id in range(num_rows)], [gguf.TokenType.UNUSED] * num_rows
    for token, id in vocab.items():
        tokens[id], types[id] = token, gguf.TokenType.NORMAL
    for id, entry in added.items():
        types[id] = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
    if len(set(tokens)) < num_rows:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise InputError(f"{file} has a token {twice!r}, which names an unused id in GGUF; give it another name")
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        # What is not named would be 11 in llama.cpp, whatever that token is here.
        bos_id=_named(folder, config, "bos_token", vocab, otherwise=EOT),
        eos_id=_named(folder, config, "eos_token", vocab, otherwise=EOT),
        pad_id=_named(folder, config, "pad_token", vocab) if config.get("pad_token") else None,
        eot_id=vocab.get(IM_END),
        chat_template=_chat_template(folder, config),
    )


def _pre_tokenizer(file: Path, parsed: Mapping[str, Any]) -> str:
    # llama.cpp normalises nothing. Most text is in NFC already; another normalizer would change much of it.
    if (parsed.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise InputError(
            f"{file} normalizes text by {parsed['normalizer']['type']}, which llama.cpp does not do; export to the "
            "Hugging Face layout instead"
        )
    match (parsed.get("pre_tokenizer") or {}).get("pretokenizers"):
        case [
            {"type": "Split", "pattern": {"Regex": str(split)}, "behavior": behavior, "invert": invert},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if behavior == "Isolated" or (behavior == "Removed" and invert):  # the pattern leaves nothing between matches
            key = (split, bool(parsed["model"].get("ignore_merges", False)))
            if key in PRE_TOKENIZERS:
                return PRE_TOKENIZERS[key]
    raise InputError(
        f"{file} splits text as none of llama.cpp's pre-tokenizers known here does (GPT-4's split and Qwen's); export "
        "to the Hugging Face layout instead"
    )


def _named(
    folder: Path, config: Mapping[str, Any], key: str, vocab: Mapping[str, int], otherwise: str | None = None
) -> int:
    token = config.get(key) or otherwise
    content = str(token["content"] if isinstance(token, dict) else token)
    if content not in vocab:
        raise InputError(
            f"{folder}: {key} would be {content!r}, which the vocabulary does not have; name one that it has as {key} "
            "in tokenizer_config.json"
        )
    return vocab[content]


def _chat_template(folder: Path, config: Mapping[str, Any]) -> Any:
    """One template, or several as [{"name", "template"}]; newer directories keep theirs in a file of its own."""
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
