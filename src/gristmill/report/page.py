"""report.html: the words and tables around the pictures, put into `page.html` by Jinja with escaping on everywhere.

Whatever a model, a file name or a package's metadata says reaches the page through `visible` and Jinja's escaping;
only our own SVG is marked safe, and that escapes its strings itself. The page's Content-Security-Policy forbids every
outside address and every script but the one inlined here, so even a mistake in that could load or run nothing.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from gristmill import artifact
from gristmill.report import lineage, pictures
from gristmill.report.charts import HEAT_EDGES
from gristmill.report.collect import Report, baselines, held_out, licenses
from gristmill.report.figures import facts, figures, to_json
from gristmill.report.text import bits, count, duration, is_number, listed, percent, short, size, visible

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
)
MAX_LICENSES = 12
OWN_DATA = "{notes: {path: ~/notes, license: CC0-1.0}}"


def write(report: Report) -> None:
    """Write report.html and report.json into the run folder, each replaced in one step."""
    artifact.write_atomically(report.run / "report.json", artifact.canonical(to_json(report)))
    artifact.write_atomically(report.run / "report.html", to_html(report).encode())


def to_html(report: Report) -> str:
    """The whole page. The same report gives the same bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    said = to_json(report)
    nodes = lineage.graph(report.stages, held(report))
    return environment.get_template("page.html").render(
        policy=POLICY.format(digest=digest),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        safe=Markup,
        readout=lambda pairs: json.dumps(pairs, ensure_ascii=False, separators=(",", ":"), allow_nan=False),
        report=report,
        said=said,
        summary=summary(report),
        unfinished=unfinished(report),
        facts=facts(report),
        comparison=pictures.comparison(report),
        by_source=by_source(report),
        curves=[p for p in (pictures.training_loss(report), pictures.validation_curve(report)) if p],
        curriculum=[(band.label.split(" · ")[0], shares) for band, shares in pictures.curriculum(report)],
        running=[p for curve in pictures.CURVES if (p := pictures.draw_curve(report, curve))],
        layers=pictures.expert_layers(report),
        num_experts=pictures.num_experts(report),
        heat_edges=[f"{edge:.3g}" for edge in HEAT_EDGES],
        samples=(report.evaluation or {}).get("samples", []),
        parse=parse_sentence(report),
        corpus=corpus(report),
        lineage_wide=lineage.draw(nodes, id="lineage-wide", upright=False),
        lineage_narrow=lineage.draw(nodes, id="lineage-narrow", upright=True),
        recipe=yaml.safe_dump(said["recipe"], sort_keys=False, allow_unicode=True, width=100) if report.recipe else "",
        machine=machine(report),
        commands=commands(report),
        duration=duration,
        count=count,
        size=size,
        percent=percent,
        bits=bits,
        color=lambda source: pictures.color(report, source),
    )


# ---- sentences -----------------------------------------------------------------------------------------


def summary(report: Report) -> str:
    """What was built, from what, in what time, in one sentence."""
    found = figures(report)
    sources = report.sources()
    experts = pictures.num_experts(report)
    top_k = _below(report.recipe, "model", "moe_top_k")
    what = "A mixture-of-experts language model" if experts else "A language model"
    if found["total_params"]:
        what += f" of {short(found['total_params'])} parameters"
        detail = [f"{short(found['active_params'])} active per token"] if found["active_params"] else []
        detail += [f"{experts} experts choose {top_k}"] if experts and is_number(top_k) else []
        what += f" ({', '.join(detail)})" if detail else ""
    if found["train_tokens"]:
        start = _below(report.recipe, "start")
        what += f", trained {'further' if start else 'from scratch'} on {short(found['train_tokens'])} tokens"
        what += f" of {listed(sources)}" if sources else ""
        what += f" in {duration(found['train_seconds'])}" if found["train_seconds"] else ""
    cores = report.machine.get("cores")
    if found["train_tokens"] and is_number(cores):
        what += f" on {cores:g} CPU core{'s' if cores != 1 else ''}"
    if found["held_out_bits_per_byte"]:
        what += f"; it reads text that it has never seen at {bits(found['held_out_bits_per_byte'])} bits per byte"
    return what + "."


def unfinished(report: Report) -> str:
    if not report.missing:
        return " ".join(f"The {name} was skipped: {reason}." for name, reason in report.skipped.items())
    at = f" Training has logged step {count(report.train[-1].get('step', 0))}." if report.train else ""
    return f"This run is not finished. Stages that have not run yet: {listed(report.missing)}.{at}"


def parse_sentence(report: Report) -> str:
    shares = (report.evaluation or {}).get("parse_share") or {}
    said = [f"{percent(shares[how])} of the {how} ones" for how in ("greedy", "sampled") if is_number(shares.get(how))]
    if not said:
        return ""
    num = shares.get("functions")
    of = f"Of {count(num)} functions" if is_number(num) else "Of the functions"
    return f"{of} to complete, {listed(said)} parse as Python."


def held(report: Report) -> dict[str, str]:
    """A few words of what each stage's artifact holds, for the lineage picture."""
    shards = report.metrics("shards").get("sources", {})
    found = figures(report)
    words = {
        "corpus": ("{} documents", report.metrics("corpus").get("documents")),
        "tokenizer": ("{} ids", report.metrics("tokenizer").get("vocab_size")),
        "shards": ("{} tokens", sum(s.get("tokens", 0) for s in shards.values()) or None),
        "train": ("{} parameters", found["total_params"]),
    }
    said = {name: form.format(short(value)) for name, (form, value) in words.items() if is_number(value)}
    if found["held_out_bits_per_byte"]:
        said["evaluate"] = f"{bits(found['held_out_bits_per_byte'])} bits per byte"
    if report.model_type:
        said["export"] = f"{report.model_type} layout"
    return said


# ---- tables --------------------------------------------------------------------------------------------


def by_source(report: Report) -> dict[str, Any] | None:
    """Held-out bits per byte, sources in columns, the best of each column marked."""
    ours = held_out(report)
    if not ours:
        return None
    columns = ["all", *sorted(name for name in ours if name != "all")]
    theirs = [(name, pictures.BASELINE_NAMES[name], said) for name, said in baselines(report).items() if said]
    rows = sorted([("held_out", "This model", ours), *theirs], key=lambda row: row[2].get("all", 0.0))
    best = {c: min((said[c] for _, _, said in rows if is_number(said.get(c))), default=None) for c in columns}
    return {
        "columns": columns,
        "longest": max([v for _, _, said in rows for v in said.values() if is_number(v)], default=0) or 1,
        "rows": [
            (label, said is ours, [(f"{key}_bits_per_byte:{c}", said.get(c), said.get(c) == best[c]) for c in columns])
            for key, label, said in rows
        ],
    }


def corpus(report: Report) -> dict[str, Any] | None:
    """Tables of what the data is: sources, splits, drops with examples, licenses by bytes."""
    if "corpus" not in report.stages:
        return None
    manifest, metrics = report.stages["corpus"].manifest, report.metrics("corpus")
    splits = metrics.get("splits", {})
    total = sum(source["bytes"] for source in manifest["sources"].values()) or 1
    ranked = list(licenses(report).items())
    licensed = sum(num for _, num in ranked) or 1
    drops = report.drops or {reason: {"count": num} for reason, num in metrics.get("dropped", {}).items()}
    most = max((said["count"] for said in drops.values()), default=1) or 1
    return {
        "sources": [
            (name, s, s["bytes"] / total, len(s.get("packages", {}))) for name, s in sorted(manifest["sources"].items())
        ],
        "splits": [(name, splits[name]) for name in ("train", "validation", "test") if name in splits],
        "licenses": [(name, num, num / licensed) for name, num in ranked[:MAX_LICENSES]],
        "more_licenses": [name for name, _ in ranked[MAX_LICENSES:]],
        "drops": [
            (reason.replace("_", " "), said, said["count"] / most)
            for reason, said in sorted(drops.items(), key=lambda item: (-item[1]["count"], item[0]))
        ],
    }


def machine(report: Report) -> list[tuple[str, str]]:
    """The machine's figures with their units, then the versions that made the newest artifact."""
    said = dict(report.machine)
    rows = []
    for key, label, unit in (
        ("cpu", "Processor", ""),
        ("cores", "Cores", ""),
        ("threads", "Threads used", ""),
        ("memory_gib", "Memory", " GiB"),
        ("gemm_tflops", "Matrix products", " TFLOP/s"),
        ("data_sheet_tflops", "Data sheet", " TFLOP/s"),
        ("dtype", "Computes in", ""),
        ("kernels", "Kernels", ""),
    ):
        if (value := said.pop(key, None)) is not None:
            rows.append((label, _plainly(value) + unit))
    rows += [(key.replace("_", " "), _plainly(value)) for key, value in said.items()]
    versions: Mapping[str, str] = list(report.stages.values())[-1].manifest["versions"] if report.stages else {}
    return rows + sorted(versions.items())


def _plainly(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plainly(item)}" for name, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def commands(report: Report) -> list[tuple[str, str]]:
    """What to try next, each line ready to be pasted where the run was started."""
    run = shlex.quote(report.run.as_posix())
    recipe = shlex.quote(str(report.recipe.get("name") or report.name))
    lr = _below(report.recipe, "train", "optimizer", "lr")
    setting = f"train.optimizer.lr={lr / 2 if is_number(lr) else 0.001:g}"
    model = f"gristmill generate {run} 'def fibonacci('"
    return [
        *([("Let it write", model), ("Serve it", f"gristmill serve {run}")] if "train" in report.stages else []),
        *([("Finish this run", f"gristmill run {recipe} --out {run}")] if report.missing else []),
        (
            "Change one setting; what does not depend on it is kept",
            f"gristmill run {recipe} --out {run} --set {setting}",
        ),
        ("Train on text of your own", f"gristmill run {recipe} --out runs/mine --set 'corpus.sources={OWN_DATA}'"),
        ("See every setting", f"gristmill recipe {recipe}"),
        ("Check every byte of the run", f"gristmill verify {run}"),
        ("Where it all came from", f"gristmill lineage {run}"),
        ("Write this page again", f"gristmill report {run}"),
    ]


def _below(tree: Mapping[str, Any], *keys: str) -> Any:
    """tree[a][b]…, or None where the way ends."""
    node: Any = tree
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
