"""GGUF: the one file that llama.cpp runs, and with it Ollama, LM Studio, llama-cpp-python and others.

llama.cpp has a graph for each published layout. Its source defines the tensors and settings that a graph reads
(src/models/, src/llama-graph.cpp, src/llama-vocab.cpp); checked with commit 0c1e57098.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import gguf
import torch
from torch import Tensor

from gristmill.errors import Failure, InputError
from gristmill.hub.importing import chat_template
from gristmill.hub.layouts import LAYOUTS, PublishedLayout, unsupported
from gristmill.hub.mapping import Piece, TensorMap, as_one_expert, shapes, to_published
from gristmill.hub.published import main_dtype
from gristmill.hub.quantized import HEAD_BITS
from gristmill.hub.settings import read_json
from gristmill.hub.tensors import Weight, Weights, check_names
from gristmill.kernels.quantized import WIDTHS, width_of
from gristmill.model import ModelConfig
from gristmill.progress import bar
from gristmill.tokenizer.layout import EOT, IM_END, SPLIT_PATTERN, byte_of_symbol
from gristmill.tokenizer.start import find_start_id

MAX_LAYERS = 512  # llama.cpp's tables have this size, and a larger model ends the process that loads it
MAX_EXPERTS = 1024

GgufDtype: TypeAlias = torch.dtype | str  # a key of QUANTIZED
EIGHT_BITS = ("wte.weight", "lm_head.weight")  # whatever the width of the others is

STORED = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}

# Blocks of 32 inputs that share an fp16 scale
QUANTIZED = {
    width.gguf: (gguf.GGMLQuantizationType[width.gguf.upper()], gguf.LlamaFileType[f"MOSTLY_{width.gguf.upper()}"])
    for width in WIDTHS
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
    dtype: GgufDtype | None = None,
) -> None:
    """Write a model and its tokenizer as one GGUF file.

    weights: under our own names. tokenizer: a directory with tokenizer.json and tokenizer_config.json. dtype: a key of
    STORED or of QUANTIZED for the matrices; None keeps the one that most weights have. Norm scales and routers are
    always float32; embeddings and output have HEAD_BITS where the rest is quantized. One tensor is in memory at a time;
    the same input gives the same bytes.

    llama.cpp keeps keys and values in float16 unless told otherwise: to compare logits, give it float32 for both.

    Raises InputError for what llama.cpp cannot say, Failure when the tokenizer is damaged.
    """
    cfg, weights = as_one_expert(cfg, weights)
    check_names(shapes(cfg), weights)
    layout, graph_cfg = find_graph(cfg)
    if cfg.tie_word_embeddings and not graph_cfg.tie_word_embeddings:
        weights = {**weights, "lm_head.weight": weights["wte.weight"]}
    cfg = graph_cfg
    if dtype is None:
        dtype = main_dtype(weights)
        dtype = torch.float32 if dtype == torch.float64 else dtype
    if dtype not in STORED and dtype not in QUANTIZED:
        names = [*(str(plain).removeprefix("torch.") for plain in STORED), *QUANTIZED]
        raise InputError(f"dtype={dtype} is not written to GGUF; give one of {', '.join(names)}")

    table = gguf_tensors(layout, cfg)
    exact = {name for name in table if "norm" in name or ".router." in name}
    plain = dtype if isinstance(dtype, torch.dtype) else None
    tensors = to_published(
        table,
        {name: weights[name].to(torch.float32 if name in exact else plain or weights[name].dtype) for name in table},
    )
    kinds: dict[str, gguf.GGMLQuantizationType] = {}
    for ours, pieces in table.items():
        for piece in pieces:
            if isinstance(dtype, str) and ours not in exact:
                kinds[piece.name] = QUANTIZED[width_of(HEAD_BITS).gguf if ours in EIGHT_BITS else dtype][0]
            else:
                kinds[piece.name] = STORED[tensors[piece.name].dtype][0]
    stored = {key: _in_blocks(key, tensors[key], kind) for key, kind in kinds.items()}
    with TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        partial = Path(folder) / file.name
        with closing(gguf.GGUFWriter(partial, layout.gguf_architecture)) as writer:
            for key, kind in kinds.items():
                writer.add_tensor_info(key, tensors[key].shape, None, stored[key].nbytes, raw_dtype=kind)  # type: ignore[arg-type]  # the code stands in its place
            _describe(writer, layout, cfg, name, license, dtype)
            _add_tokenizer(writer, tokenizer, weights["wte.weight"].shape[0])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        _append_tensors(partial, writer.data_alignment, stored)
        partial.replace(file)


# ---- tensors -------------------------------------------------------------------------------------------


def find_graph(cfg: ModelConfig) -> tuple[PublishedLayout, ModelConfig]:
    """Find the layout whose llama.cpp graph computes this model.

    Returns the layout and the configuration that the graph computes: with tied embeddings untied where the graph has no
    tied form, so that the file holds the matrix twice. Unlike `config.json`, a graph reads any epsilon.
    Raises InputError when no graph computes it.
    """
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
    for candidate in (cfg, replace(cfg, tie_word_embeddings=False)):
        for layout in LAYOUTS:
            if layout.computes(candidate):
                return layout, candidate
    raise unsupported(cfg)


def gguf_tensors(layout: PublishedLayout, cfg: ModelConfig) -> TensorMap:
    """Map our tensors to those of a GGUF file, with shapes in torch's order: GGUF lists dimensions in reverse."""
    D, F, E, V = cfg.d_model, cfg.ffn_hidden_size, cfg.moe_num_experts, cfg.vocab_size or 0
    table: dict[str, Sequence[Piece]] = {"wte.weight": [Piece("token_embd.weight", (V, D))]}
    for i in range(cfg.n_layers):
        ours, theirs = f"blocks.{i}.", f"blk.{i}."
        table[f"{ours}norm_1.weight"] = [Piece(f"{theirs}attn_norm.weight", (D,))]
        table |= layout.gguf_attention(cfg, ours, theirs)
        table |= {
            f"{ours}attn.out_proj.weight": [Piece(f"{theirs}attn_output.weight", (D, cfg.n_heads * cfg.head_dim))],
            f"{ours}norm_2.weight": [Piece(f"{theirs}{layout.gguf_norm_2}.weight", (D,))],
            f"{ours}ffn.router.weight": [Piece(f"{theirs}ffn_gate_inp.weight", (E, D))],
            f"{ours}ffn.experts.w1": [Piece(f"{theirs}ffn_gate_exps.weight", (E, F, D))],
            f"{ours}ffn.experts.v1": [Piece(f"{theirs}ffn_up_exps.weight", (E, F, D))],
            # ggml multiplies by a matrix's rows, and ours maps [F] to [D] by its columns
            f"{ours}ffn.experts.w2": [Piece(f"{theirs}ffn_down_exps.weight", (E, D, F), transposed=True)],
        }
    table["norm_f.weight"] = [Piece("output_norm.weight", (D,))]
    if not cfg.tie_word_embeddings:
        table["lm_head.weight"] = [Piece("output.weight", (V, D))]
    return table


def _in_blocks(key: str, weight: Weight, kind: gguf.GGMLQuantizationType) -> Weight:
    """Return the weight as the file stores it: the bytes of its blocks if `kind` is quantized."""
    if kind not in {quantized for quantized, _ in QUANTIZED.values()}:
        return weight
    numbers, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    *outer, inputs = weight.shape
    if inputs % numbers:
        raise InputError(
            f"{key} has {inputs} inputs, and {kind.name} wants a multiple of {numbers}; give another dtype"
        )

    def load() -> Tensor:
        return torch.from_numpy(gguf.quants.quantize(weight.load().float().contiguous().numpy(), kind))

    return Weight((*outer, inputs // numbers * num_bytes), torch.uint8, load)


def _append_tensors(file: Path, alignment: int, tensors: Weights) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    with file.open("ab") as out, bar(f"writing {file.stem}", total) as advance:
        out.write(bytes(-out.tell() % alignment))
        for tensor in tensors.values():
            out.write(_bytes(tensor.load()))  # no name holds it: it is gone before the next one is there
            out.write(bytes(-out.tell() % alignment))
            advance(tensor.nbytes)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


# ---- metadata ------------------------------------------------------------------------------------------


def _describe(
    writer: gguf.GGUFWriter,
    layout: PublishedLayout,
    cfg: ModelConfig,
    name: str,
    license: str | None,
    dtype: GgufDtype,
) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    if license is not None:
        writer.add_license(license)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type((QUANTIZED[dtype] if isinstance(dtype, str) else STORED[dtype])[1])

    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layers)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.kv_n_heads)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_expert_count(cfg.moe_num_experts)
    writer.add_expert_used_count(cfg.moe_top_k)
    writer.add_feed_forward_length(cfg.ffn_hidden_size)
    layout.add_gguf_settings(writer, cfg)


# ---- the tokenizer -------------------------------------------------------------------------------------


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, num_rows: int) -> None:
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
        writer.add_tokenizer_model("gpt2")  # any byte-level BPE
        writer.add_tokenizer_pre(_pre_tokenizer(file, parsed))
        vocab = _add_vocabulary(writer, file, parsed, num_rows)
        # What is not named would be 11 in llama.cpp, whatever that token is here.
        start, bos = find_start_id(folder, parsed, config), config.get("bos_token") or EOT
        named = _named(folder, "bos_token", bos, vocab)
        writer.add_bos_token_id(named if start is None else start)
        writer.add_eos_token_id(_named(folder, "eos_token", config.get("eos_token") or EOT, vocab))
        if config.get("pad_token"):
            writer.add_pad_token_id(_named(folder, "pad_token", config["pad_token"], vocab))
        if IM_END in vocab:
            writer.add_eot_token_id(vocab[IM_END])
        writer.add_add_bos_token(start is not None)
        if template := chat_template(folder) or config.get("chat_template"):
            _require_text([template] if isinstance(template, str) else [choice["template"] for choice in template])
            writer.add_chat_template(template)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Failure(f"{folder} is not a byte-level BPE: {problem!r}; fetch or build it again") from None


def _add_vocabulary(writer: gguf.GGUFWriter, file: Path, parsed: dict[str, Any], num_rows: int) -> dict[str, int]:
    added = {int(token["id"]): token for token in parsed["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parsed["model"]["merges"]]
    vocab: dict[str, int] = parsed["model"]["vocab"] | {token["content"]: id for id, token in added.items()}
    if not {*"".join(token for token, id in vocab.items() if id not in added)} <= byte_of_symbol().keys():
        raise ValueError("its tokens are not byte-level")
    if parsed["model"].get("continuing_subword_prefix") or parsed["model"].get("end_of_word_suffix"):
        raise ValueError("it marks where words begin or end")
    smallest, largest = min(vocab.values()), max(vocab.values())
    if smallest < 0:
        raise ValueError(f"it has the id {smallest}")
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
    _require_text([*tokens, *merges])
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in types])
    writer.add_token_merges(merges)
    return vocab


def _require_text(texts: list[str]) -> None:
    """Raises TypeError or ValueError (half of a surrogate pair) now, and not when the file is written."""
    "".join(texts).encode()


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


def _named(folder: Path, key: str, token: Any, vocab: Mapping[str, int]) -> int:
    content = token["content"] if isinstance(token, dict) else token
    if content not in vocab:
        raise InputError(
            f"{folder}: {key} would be {content!r}, which the vocabulary does not have; name one that it has as {key} "
            "in tokenizer_config.json"
        )
    return vocab[content]
