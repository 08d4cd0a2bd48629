"""The report's charts: which figures go into which picture, and the sentence that says what to see in it.

Pure: a `Report` in, `Picture`s out. Each chart is drawn twice, for a wide and for a narrow page (see `charts`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from gristmill.report import charts
from gristmill.report.charts import Band, Bar, Series
from gristmill.report.collect import BASELINES, Report, baselines, held_out
from gristmill.report.text import TIMES, bits, count, is_number, listed, percent, scientific, short
from gristmill.train.log import Record

WIDE, NARROW = 520, 340  # px: half of a desktop page; a phone, or half of a printed page
MAX_POINTS = 500  # per line: more would not be seen
MAX_COLUMNS = 60  # per heat map
BASELINE_NAMES = {"trigram": "Token trigram", "xz": "xz, all at once", "xz_document": "xz, per document"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """`readout`: (x, words) pairs that the page shows under the pointer; `caption` is plain text."""

    title: str
    caption: str
    wide: str
    narrow: str
    readout: tuple[tuple[float, str], ...] = ()


def _twice(draw: Callable[[int, str], str], id: str) -> tuple[str, str]:
    return draw(WIDE, f"{id}-wide"), draw(NARROW, f"{id}-narrow")


# ---- numbers over training -----------------------------------------------------------------------------


def number(value: object) -> float:
    """A figure of a record; NaN (a gap in the line) for whatever is none."""
    return float(value) if is_number(value) else math.nan


def pooled(values: Sequence[float], num: int) -> list[float]:
    """Means over at most `num` runs of neighbours of equal length."""
    stride = max(1, math.ceil(len(values) / num))
    groups = [charts.finite(values[i : i + stride]) for i in range(0, len(values), stride)]
    return [fmean(group) if group else math.nan for group in groups]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential mean over about `span` values, without the bias to its start; gaps stay gaps."""
    keep = 1 - 1 / max(span, 1.0)
    total = weight = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if math.isfinite(value) else math.nan)
    return out


def tokens_range(report: Report) -> tuple[float, float]:
    seen = [number(r.get("tokens")) for r in (*report.train, *report.validation)]
    return 0.0, max(charts.finite(seen), default=1.0)


def color(report: Report, source: str) -> int:
    """Color 0 is kept for totals; sources share six more in turn."""
    names = report.sources()
    return 1 + names.index(source) % 6 if source in names else 0


def curriculum(report: Report) -> list[tuple[Band, dict[str, float]]]:
    """The stages of the mix as bands over tokens, each with the shares that its tokens really had."""
    stages: list[tuple[Band, dict[str, float]]] = []
    start, before = 0.0, dict[str, float]()
    for n, record in enumerate(report.train):
        after = report.train[n + 1] if n + 1 < len(report.train) else None
        if after and after.get("curriculum_stage") == record.get("curriculum_stage"):
            continue
        seen = record.get("source_tokens", {})
        added = {name: seen[name] - before.get(name, 0) for name in seen}
        total = sum(added.values()) or 1
        shares = {name: tokens / total for name, tokens in sorted(added.items(), key=lambda item: -item[1])}
        mix = "".join(f" · {percent(share)} {name}" for name, share in list(shares.items())[:1])
        end = number(record.get("tokens"))
        if math.isfinite(end):
            stages.append((Band(start, end, f"Stage {len(stages) + 1}{mix}"), shares))
            start, before = end, seen
    return stages


def _bands(report: Report) -> list[Band]:
    stages = curriculum(report)
    return [band for band, _ in stages] if len(stages) > 1 else []


def training_loss(report: Report) -> Picture | None:
    """All sources smoothed over the raw figures, and each source alone."""
    records = [r for r in report.train if "loss" in r]
    known = charts.finite([number(r["loss"]) for r in records])
    if not known:
        return None
    x = pooled([number(r.get("tokens")) for r in records], MAX_POINTS)
    raw = pooled([number(r["loss"]) for r in records], MAX_POINTS)
    span = len(raw) / 40
    total = smooth(raw, span)
    lines = [Series(x=x, y=raw, color=0, faint=True)] if span > 1 else []
    for name in sorted({name for r in records for name in r.get("source_loss", {})}):
        y = pooled([number(r.get("source_loss", {}).get(name)) for r in records], MAX_POINTS)
        lines.append(Series(x=x, y=smooth(y, span), name=name, color=color(report, name)))
    lines.append(Series(x=x, y=total, name="all", color=0))
    settled = [v for s in lines for v in charts.finite(s.y[len(s.y) // 8 :])]
    highest = max(v for s in lines for v in charts.finite(s.y))
    cut = max(settled) if settled and max(settled) < 0.85 * highest else None
    ends = charts.finite(total)
    caption = f"From {known[0]:.2f} to {ends[-1]:.2f} nats per token."
    if skipped := int(number(records[-1].get("skipped_steps", 0))):
        caption += f" {skipped} step{'s were' if skipped > 1 else ' was'} left out: no number, or a spike."
    if len(ends) > 8:
        change = f"{ends[-1] - ends[len(ends) * 3 // 4]:+.2f}".replace("-", "\N{MINUS SIGN}")
        caption += f" The last quarter changed it by {change}."
    if len(known) < len(records):
        caption += f" In {len(records) - len(known)} of {len(records)} logged steps the loss was not finite."
    if cut:
        caption += " The first steps lie above the picture."
    wide, narrow = _twice(
        lambda width, id: charts.line_chart(
            lines,
            id=id,
            title="Training loss",
            description=caption,
            x_title="tokens",
            y_title="nats per token",
            x_range=tokens_range(report),
            width=width,
            y_high=cut,
            bands=_bands(report),
        ),
        "loss",
    )
    readout = _readout(x, lines, "{:.3f}")
    return Picture(title="Training loss", caption=caption, wide=wide, narrow=narrow, readout=readout)


def validation_curve(report: Report) -> Picture | None:
    records = [r for r in report.validation if r.get("bits_per_byte")]
    if not records:
        return None
    x = [number(r.get("tokens")) for r in records]
    names = sorted({name for r in records for name in r["bits_per_byte"]} - {"all"})
    lines = [
        Series(
            x=x,
            y=[number(r["bits_per_byte"].get(name)) for r in records],
            name=name,
            color=color(report, name),
            dots=len(records) < 40,
        )
        for name in [*names, "all"]
    ]
    overall = lines[-1].y
    caption = "Text that training never sees; lower is better."
    if charts.finite(overall):
        best = min(range(len(x)), key=lambda i: overall[i] if math.isfinite(overall[i]) else math.inf)
        caption = f"Text that training never sees. Lowest at {short(x[best])} tokens: {bits(overall[best])}."
    wide, narrow = _twice(
        lambda width, id: charts.line_chart(
            lines,
            id=id,
            title="Validation",
            description=caption,
            x_title="tokens",
            y_title="bits per byte",
            x_range=tokens_range(report),
            width=width,
            bands=_bands(report),
        ),
        "validation",
    )
    return Picture(title="Validation", caption=caption, wide=wide, narrow=narrow, readout=_readout(x, lines, "{:.3f}"))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A number of the training's records over its tokens. `key`: its name in a record. `form`: of a value, for readers.

    caption: describes the pooled values. marks_resumes: for numbers that a resume may disturb.
    """

    key: str
    id: str
    title: str
    unit: str = ""
    name: str
    form: str
    caption: Callable[[Sequence[float]], str]
    marks_resumes: bool = False


CURVES = (
    Curve(
        key="tokens_per_second",
        id="speed",
        title="Speed",
        unit="tokens per second",
        name="tokens/s",
        form="{:,.0f}",
        caption=lambda values: f"Median {count(median(values))}, from {count(min(values))} to {count(max(values))}.",
        marks_resumes=True,
    ),
    Curve(
        key="lr",
        id="lr",
        title="Learning rate",
        name="learning rate",
        form="{:.3g}",
        caption=lambda values: f"Highest {rate(max(charts.finite(values)))}, last {rate(values[-1])}.",
    ),
)


def draw_curve(report: Report, curve: Curve) -> Picture | None:
    """Draw a curve from 0 up; None while no record has its number."""
    records = [r for r in report.train if is_number(r.get(curve.key))]
    if not records:
        return None
    x = pooled([number(r.get("tokens")) for r in records], MAX_POINTS)
    y = pooled([r[curve.key] for r in records], MAX_POINTS)
    caption, marks = curve.caption(y), _resume_marks(report) if curve.marks_resumes else []
    if marks:
        caption += f" Resumed {len(marks)} time{'s' if len(marks) > 1 else ''}."
    wide, narrow = _twice(
        lambda width, id: charts.line_chart(
            [Series(x=x, y=y)],
            id=id,
            title=curve.title,
            description=caption,
            x_title="tokens",
            y_title=curve.unit,
            x_range=tokens_range(report),
            width=width,
            height=210,
            from_zero=True,
            marks=marks,
        ),
        curve.id,
    )
    readout = _readout(x, [Series(x=x, y=y, name=curve.name)], curve.form)
    return Picture(title=curve.title, caption=caption, wide=wide, narrow=narrow, readout=readout)


def _resume_marks(report: Report) -> list[tuple[float, str]]:
    at = {r.get("step"): number(r.get("tokens")) for r in (*report.train, *report.validation)}
    return [(at[r["step"]], "resumed") for r in report.resumes if math.isfinite(at.get(r.get("step"), math.nan))]


def rate(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else scientific(value)


def _readout(x: Sequence[float], lines: Sequence[Series], form: str) -> tuple[tuple[float, str], ...]:
    named = [s for s in reversed(lines) if s.name]
    said = []
    for i, at in enumerate(x):
        parts = [f"{s.name} {form.format(s.y[i])}" for s in named if math.isfinite(s.y[i])]
        if math.isfinite(at) and parts:
            said.append((at, f"{short(at)} tokens: {', '.join(parts)}"))
    return tuple(said)


# ---- experts -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer's load over training: `ratios` are [experts][moments], 1 where balanced, busiest expert first."""

    number: int
    picture: str
    readout: tuple[tuple[float, str], ...]
    idlest: float
    busiest: float


def expert_layers(report: Report) -> list[Layer]:
    """A heat map per layer. The last moment's extremes are given as numbers, since they are what one looks for."""
    records = [r for r in report.train if r.get("expert_load")]
    records = [r for r in records if _shape(r) == _shape(records[-1])]
    stride = 1 + len(records) // (10 * MAX_COLUMNS)  # ten records a column tell its mean, however long the log
    records = records[::-1][::stride][::-1]
    if not records:
        return []
    tokens = pooled([number(r.get("tokens")) for r in records], MAX_COLUMNS)
    layers = []
    for n, last in enumerate(records[-1]["expert_load"]):
        experts = [
            pooled([len(last) * number(r["expert_load"][n][e]) for r in records], MAX_COLUMNS) for e in range(len(last))
        ]
        # Experts have no order of their own; ranked by what they end with, a panel reads from busy to idle.
        late = [fmean(charts.finite(row[len(row) * 3 // 4 :]) or [0.0]) for row in experts]
        ranked = sorted(range(len(last)), key=lambda e: -late[e])
        ends = charts.finite([row[-1] for row in experts]) or [math.nan]
        picture = charts.heat_map(
            [experts[e] for e in ranked],
            id=f"layer-{n}",
            title=f"Layer {n}",
            description=f"Load of {len(last)} experts over training; at the end "
            f"{min(ends):.2f} to {max(ends):.2f} times the balanced share.",
            row_height=max(2, 96 // len(last)),
        )
        readout = tuple((float(i), _extremes(tokens[i], [row[i] for row in experts])) for i in range(len(tokens)))
        layers.append(Layer(n, picture, readout, min(ends), max(ends)))
    return layers


def num_experts(report: Report) -> int:
    """Experts per layer; 0 for a dense model, or before the first log."""
    return next((len(r["expert_load"][0]) for r in reversed(report.train) if r.get("expert_load")), 0)


def _shape(record: Record) -> list[int]:
    return [len(layer) for layer in record["expert_load"]]


def _extremes(tokens: float, loads: Sequence[float]) -> str:
    known = {e: load for e, load in enumerate(loads) if math.isfinite(load)}
    if not known:
        return f"{short(tokens)} tokens"
    top, low = max(known, key=lambda e: known[e]), min(known, key=lambda e: known[e])
    return f"{short(tokens)} tokens: expert {top} {known[top]:.2f}{TIMES}, expert {low} {known[low]:.2f}{TIMES}"


# ---- held-out comparison -------------------------------------------------------------------------------


def comparison(report: Report) -> Picture | None:
    """The model beside its baselines on the same bytes, best first."""
    ours = held_out(report).get("all")
    if not is_number(ours):
        return None
    theirs = {name: said.get("all") for name, said in baselines(report).items()}
    items = [Bar("This model", ours, bits(ours), ours=True)]
    items += [Bar(BASELINE_NAMES[n], v, bits(v)) for n in BASELINES if is_number(v := theirs[n])]
    items.sort(key=lambda item: item.value)
    caption = verdict(ours, {BASELINE_NAMES[n]: v for n, v in theirs.items() if is_number(v)})
    wide, narrow = _twice(
        lambda width, id: charts.bars(
            items, id=id, title="Bits per byte of held-out text", description=caption, width=width
        ),
        "held-out",
    )
    return Picture(title="Bits per byte of held-out text", caption=caption, wide=wide, narrow=narrow)


def verdict(ours: float, theirs: dict[str, float]) -> str:
    """Who wins, and by how much, in a sentence: also where it is not the model."""
    won = [f"{percent(1 - ours / bpb)} fewer than {_inside(name)}" for name, bpb in theirs.items() if ours < bpb]
    lost = [f"{_inside(name)} needs {percent(1 - bpb / ours)} fewer" for name, bpb in theirs.items() if bpb < ours]
    tied = [_inside(name) for name, bpb in theirs.items() if bpb == ours]
    said = f"Lower is better. The model needs {listed(won)}" if won else "Lower is better. The model beats none of them"
    if lost:
        said += f"; {listed(lost)} than the model"
    return said + (f"; {listed(tied)} needs as many." if tied else ".")


def _inside(name: str) -> str:
    return {"Token trigram": "the token trigram", "xz, all at once": "xz over all of the text at once"}.get(
        name, "xz over each document alone"
    )
