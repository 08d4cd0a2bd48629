"""The model card: what the model is, what it was made of and how good it is, for the people who meet it on a hub."""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import yaml

from gristmill.artifact import Artifact, Origin
from gristmill.hub.folder import ModelFolder
from gristmill.hub.layouts import PublishedLayout, published_layout
from gristmill.model import ModelConfig
from gristmill.model.counts import count_params
from gristmill.tokenizer import Tokenizer

BASELINES = {"trigram": "token trigram", "xz": "xz -9e, all of it", "xz_document": "xz -9e, each document alone"}


def model_card(
    name: str,
    license: Mapping[str, str],
    model: ModelFolder,
    artifact: Artifact | None,
    origin: Origin | None,
    evaluation: Mapping[str, Any] | None,
    quantized: str | None = None,
) -> str:
    """README.md with the hub's front matter.

    license: `license`, and `license_name` where that is "other", as the hub spells them.
    artifact, origin: the model's own and its lineage; None for a directory that Gristmill did not make.
    evaluation: of a model that was trained here, when there is one. quantized: how, and what that costs.
    """
    cfg = model.cfg
    layout = published_layout(cfg)
    sources = sorted(_sources(origin), key=lambda source: source.name) if origin else []
    read = [source for source in sources if "documents" in source.detail]  # text that it was trained on here
    started_from = [source for source in sources if "license" in source.detail]  # published models
    front = _front_matter(name, license, layout, evaluation)
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n",
        f"# {name}\n\n{_summary(cfg, layout, bool(read), started_from)}\n",
    ]
    if quantized:
        parts.append(f"## Quantization\n\n{quantized[0].upper()}{quantized[1:]}.\n")
    if model.tokenizer:
        usage = layout.quantized_usage if quantized else _USAGE
        parts.append(f"## Use\n\n{usage}{_beginning(Tokenizer.load(model.tokenizer), bool(read))}\n")
    if evaluation:
        parts.append(f"## Figures\n\n{_figures(evaluation)}\n")
    if started_from or not read:
        parts.append(f"## Origin\n\n{_origin(started_from)}\n")
    if read and artifact:
        parts.append(f"## Data and licenses\n\n{_data(artifact, read)}\n")
    if read and not started_from:  # else its makers' card speaks of both
        parts += [f"## Intended use\n\n{_INTENDED}\n", f"## Limits\n\n{_limits(cfg)}\n"]
    parts.append(f"## Shape\n\n{_shape(cfg)}\n")
    if artifact:
        parts.append(
            f"## Provenance\n\nMade with Gristmill from the model whose content hash is `{artifact.content}`. "
            "`manifest.json` beside this card names every stage and every source behind it; `gristmill lineage` "
            "prints them, `gristmill verify` checks every file.\n"
        )
    return "\n".join(parts)


def _front_matter(
    name: str, license: Mapping[str, str], layout: PublishedLayout, evaluation: Mapping[str, Any] | None
) -> dict[str, Any]:
    known = dict(license)
    if license["license"] in ("other", "unknown"):
        known = {"license_name": "see-this-card", "license_link": "README.md", **known, "license": "other"}
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **known,
        "tags": [layout.model_type, "mixture-of-experts", "gristmill"],
    }
    if evaluation:
        metrics = [
            {"type": "bits_per_byte", "name": f"bits per byte ({source})", "value": round(value, 4)}
            for source, value in evaluation["test"]["bits_per_byte"].items()
        ]
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": "held-out", "name": "held-out documents of the training sources"},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    return front


def _summary(cfg: ModelConfig, layout: PublishedLayout, trained: bool, started_from: list[Origin]) -> str:
    counts = count_params(cfg)
    ffn = (
        f"a mixture of {cfg.moe_num_experts} experts of which each token uses {cfg.moe_top_k}"
        if cfg.ffn == "moe"
        else "a dense feed-forward network (stored as a mixture of one expert)"
    )
    made = ""
    if trained:
        made = ", trained on the data listed below, from " + ("the model named below" if started_from else "nothing")
    return (
        f"A {'base ' if trained and not started_from else ''}language model of the {layout.title} architecture with "
        f"{ffn}: {counts.total_params:,} parameters, {counts.active_params:,} active for a token{made}."
    )


def _license(source: Origin) -> str:
    return str(source.detail.get("license_name") or source.detail["license"])


def _origin(started_from: list[Origin]) -> str:
    if not started_from:
        return (
            "Converted by Gristmill from a published directory; the tensors are those of its makers, whose card says "
            "what it was trained on, what it is good for and under which license it stands."
        )
    rows = [
        [source.name, str(source.detail.get("revision") or ""), _license(source), source.detail["fingerprint"]]
        for source in started_from
    ]
    return (
        "The weights come from a published model. Its makers' card (ORIGINAL_README.md, where it came with one) says "
        "what it was trained on and what it is good for; its license and notices stand beside this card.\n\n"
        + _table(["model", "revision", "license", "SHA-256 over its files"], rows)
    )


_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype="float32")
ids = tokenizer("def fibonacci(", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64, do_sample=False)[0], skip_special_tokens=True))
```

`gristmill generate . 'def fibonacci(' --max-tokens 64 --temperature 0` prints the same: it computes in float32.
Without `dtype`, transformers computes in the precision in which the weights are stored."""


def _beginning(tokenizer: Tokenizer, was_trained: bool) -> str:
    """A sentence on the start token, or nothing."""
    if tokenizer.start_id is not None:
        also = "" if tokenizer.chat_start_id is not None else ", but not before a conversation"
        return f" The tokenizer puts `{tokenizer.decode([tokenizer.start_id])}` before a text{also}."
    if was_trained:
        return (
            " The tokenizer adds nothing to a text, as published. In training here every document followed "
            "`<|endoftext|>`."
        )
    return ""


def _figures(evaluation: Mapping[str, Any]) -> str:
    test, baselines = evaluation["test"], evaluation["baselines"]
    sources = list(test["bits_per_byte"])
    rows = [["this model", *_cells(test["bits_per_byte"], sources)]]
    rows += [[title, *_cells(baselines[key], sources)] for key, title in BASELINES.items() if key in baselines]
    text = (
        f"Bits per byte on {test['documents']:,} held-out documents ({test['bytes']:,} bytes) of groups that training "
        "never saw; lower is better. The baselines encode the same bytes.\n\n" + _table(["", *sources], rows)
    )
    if share := evaluation.get("parse_share"):
        text += (
            f"\n\nOf {share['functions']} held-out Python functions that it completed, {share['greedy']:.0%} parse "
            f"when decoded greedily and {share['sampled']:.0%} when sampled. Parsing says nothing of being right."
        )
    return text


def _data(checkpoint: Artifact, sources: list[Origin]) -> str:
    rows = []
    for source in sources:
        detail = source.detail
        whence = ", ".join(f"{name} {version}" for name, version in sorted(detail.get("packages", {}).items()))
        size = [f"{detail['documents']:,}", f"{detail['bytes']:,}"]
        folder = PurePath(detail.get("path", "")).name  # the card goes out: where it lay on this machine does not
        rows.append([source.name, *size, whence or folder])
    licenses = [[license, f"{num_bytes:,}"] for license, num_bytes in sorted(checkpoint.licenses.items())]
    return (
        "Each document carries the license that its origin states. Counts are of the documents kept after filtering "
        "and deduplication, held-out ones included.\n\n"
        + _table(["source", "documents", "bytes", "from"], rows)
        + "\n\n"
        + _table(["license (SPDX)", "bytes"], licenses)
    )


def _sources(origin: Origin) -> Iterator[Origin]:
    """Each source once, though several stages descend from it."""
    found: dict[str, Origin] = {}

    def visit(node: Origin) -> None:
        if node.kind == "source":
            found[node.id] = node
        for parent in node.inputs:
            visit(parent)

    visit(origin)
    yield from found.values()


_INTENDED = (
    "Research on training and serving of mixture-of-experts models, completion of text like its training data, and "
    "as a starting point for continued training. It follows no instructions and holds no conversation as it is."
)


def _limits(cfg: ModelConfig) -> str:
    return (
        f"- It knows only what its training data says, in that data's languages, and states falsehoods fluently.\n"
        f"- At most {cfg.max_seq_len:,} tokens of context.\n"
        "- It may repeat passages of its training data word for word; the licenses above then apply to them.\n"
        "- No alignment, safety training or measurement of bias was done. Review what it writes, and never run its "
        "code outside of a sandbox."
    )


def _shape(cfg: ModelConfig) -> str:
    ffn = "one expert, dense" if cfg.ffn == "dense" else f"{cfg.moe_num_experts} experts, {cfg.moe_top_k} a token"
    rows = {
        "layers": cfg.n_layers,
        "width": cfg.d_model,
        "attention heads": f"{cfg.n_heads} queries, {cfg.kv_n_heads} keys and values",
        "feed-forward": f"{ffn}, {cfg.ffn_hidden_size} wide, SwiGLU",
        "vocabulary": f"{cfg.vocab_size:,}",
        "position": f"rotary, theta {cfg.rope_theta:,.0f}",
    }
    return _table(["", ""], [[name, str(value)] for name, value in rows.items()])


def _cells(figures: Mapping[str, float], names: list[str]) -> list[str]:
    return [f"{figures[name]:.3f}" if name in figures else "" for name in names]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
