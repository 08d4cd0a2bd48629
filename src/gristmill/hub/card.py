"""The model card: what the model is, what it was made of and how good it is, for the people who meet it on a hub."""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import yaml

from gristmill.artifact import Artifact, Origin
from gristmill.model import ModelConfig
from gristmill.model.counts import count_params

BASELINES = {"trigram": "token trigram", "xz": "xz -9e, all of it", "xz_document": "xz -9e, each document alone"}


def model_card(
    name: str, license: str, cfg: ModelConfig, checkpoint: Artifact, origin: Origin, evaluation: Mapping[str, Any]
) -> str:
    """README.md with the hub's front matter. `origin` is the checkpoint's lineage."""
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(name, license, evaluation), sort_keys=False) + "---\n",
        f"# {name}\n\n{_summary(cfg)}\n",
        f"## Use\n\n{_USAGE}\n",
        f"## Figures\n\n{_figures(evaluation)}\n",
        f"## Data and licenses\n\n{_data(checkpoint, origin)}\n",
        f"## Intended use\n\n{_INTENDED}\n",
        f"## Limits\n\n{_limits(cfg)}\n",
        f"## Shape\n\n{_shape(cfg)}\n",
        f"## Provenance\n\nBuilt with Gristmill from the checkpoint whose content hash is `{checkpoint.content}`. "
        "`manifest.json` beside this card names every stage and every source behind it; `gristmill lineage` prints "
        "them, `gristmill verify` checks every file.\n",
    ]
    return "\n".join(parts)


def _front_matter(name: str, license: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    metrics = [
        {"type": "bits_per_byte", "name": f"bits per byte ({source})", "value": round(value, 4)}
        for source, value in evaluation["test"]["bits_per_byte"].items()
    ]
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "held-out", "name": "held-out documents of the training sources"},
        "metrics": metrics,
    }
    named = {"license_name": "see-data-and-licenses", "license_link": "README.md"} if license == "other" else {}
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": license,
        **named,
        "tags": ["dbrx", "mixture-of-experts", "gristmill"],
        "model-index": [{"name": name, "results": [result]}],
    }


def _summary(cfg: ModelConfig) -> str:
    counts = count_params(cfg)
    ffn = (
        f"a mixture of {cfg.moe_num_experts} experts of which each token uses {cfg.moe_top_k}"
        if cfg.ffn == "moe"
        else "a dense feed-forward network (stored as a mixture of one expert)"
    )
    return (
        f"A base language model of the DBRX architecture with {ffn}: {counts.total_params:,} parameters, "
        f"{counts.active_params:,} active for a token, trained from nothing on the data listed below."
    )


_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the directory of this card
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
ids = tokenizer("<|endoftext|>def fibonacci(", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```

In training every document followed `<|endoftext|>`; begin a prompt with it. `gristmill generate` does so by itself."""


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


def _data(checkpoint: Artifact, origin: Origin) -> str:
    rows = []
    for source in sorted(_sources(origin), key=lambda source: source.name):
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
    found: dict[tuple[str, str], Origin] = {}

    def visit(node: Origin) -> None:
        if node.kind == "source":
            found[node.name, node.content] = node
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
