"""Charts as pure functions: data -> an SVG string, to be put inline into an HTML page.

No plotting library, on purpose: the report must be one file that needs nothing from outside, follow the reader's light
or dark theme, print, and stay readable on a phone. Inline SVG whose colours are CSS classes does all of that; the
page's style sheet gives `.c0` … `.c6` (series), `.h0` … `.h8` (heat) and the text their looks. Three forms cover what
the report has to show. Text in an SVG shrinks with the picture, so a caller draws a chart once per width it needs
instead of scaling one drawing.

Every string that comes in is escaped. Values that are not finite leave a gap in a line; no data gives an empty frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.report.text import THIN, escape, magnitude

CHAR = 6.4  # px: mean advance of 12 px sans-serif text, generously
LINE = 15.0  # px: least distance of two labels' baselines


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. `color` is 0 … 6: 0 is ink (for totals), the others tell sources apart. No name, no label."""

    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    color: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis. Of a label "Stage 1 · more", only "Stage 1" is drawn where it is narrow."""

    start: float
    end: float
    label: str


# ---- scales --------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from at or below `low` to at or above `high`.

    About `count` intervals. A range without extent is widened, so that there are always two ticks.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """One spelling for all ticks of an axis: same suffix, same number of decimals, as few as tell them apart."""
    divisor, suffix = magnitude(max(abs(t) for t in ticks))
    step = (ticks[1] - ticks[0]) / divisor if len(ticks) > 1 else 1.0
    if step < 1e-6:
        return [f"{t:.3g}" for t in ticks]
    decimals = next(d for d in range(12) if abs(round(step, d) - step) < step / 100)
    return [f"{t / divisor:,.{decimals}f}" + (THIN + suffix if suffix else "") if t else "0" for t in ticks]


def finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart, inside [low, high] if they fit there."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max([wanted[i], low, *(p + gap for p in placed[-1:])]))
    ceiling = high
    for n in reversed(range(len(placed))):
        placed[n] = min(placed[n], ceiling)
        ceiling = placed[n] - gap
    positions = [0.0] * len(wanted)
    for n, i in enumerate(order):
        positions[i] = placed[n]
    return positions


# ---- line chart ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where the plot area lies in the drawing, and what it spans."""

    left: float
    right: float
    top: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)


def line_chart(
    series: Sequence[Series],
    *,
    id: str,
    title: str,
    description: str,
    x_title: str,
    y_title: str,
    x_range: tuple[float, float],
    width: int = 520,
    height: int = 270,
    from_zero: bool = False,
    y_high: float | None = None,
    bands: Sequence[Band] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines over a common x, each named at its right end. `y_high` cuts off what lies above; `marks` are moments."""
    values = finite([v for s in series for v in s.y]) or [0.0, 1.0]
    top_value = min(max(values), y_high) if y_high is not None else max(values)
    y_ticks = nice_ticks(0.0 if from_zero else min(values), top_value)
    x_low, x_high = x_range if x_range[1] > x_range[0] else (x_range[0] - 0.5, x_range[0] + 0.5)
    names = [s.name for s in series if s.name]
    frame = Frame(
        left=8 + CHAR * max(map(len, tick_labels(y_ticks))),
        right=width - (16 + CHAR * max(map(len, names)) if names else 14),
        top=40 if bands or marks else 26,
        bottom=height - 36,
        x_low=x_low,
        x_high=x_high,
        y_low=y_ticks[0],
        y_high=y_ticks[-1],
    )
    body = [
        *_bands(bands, frame),
        *_axes(frame, y_ticks, x_title, y_title, width),
        *(
            f'<line class="moment" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="{frame.top}" y2="{frame.bottom}"/>'
            f'<text x="{frame.x(x):.1f}" y="{frame.top - 6}" text-anchor="middle">{escape(label)}</text>'
            for x, label in marks
        ),
        f'<clipPath id="{escape(id)}-clip"><rect x="{frame.left:.1f}" y="{frame.top}" '
        f'width="{frame.right - frame.left:.1f}" height="{frame.bottom - frame.top}"/></clipPath>',
        f'<g clip-path="url(#{escape(id)}-clip)">',
        *(mark for s in series for mark in _line(s, frame)),
        "</g>",
        *_end_labels(series, frame),
        f'<line class="cursor" y1="{frame.top}" y2="{frame.bottom}"/>',
    ]
    plot = f"{frame.left:.1f} {frame.right:.1f} {x_low:.10g} {x_high:.10g}"
    return svg("".join(body), id=id, title=title, description=description, width=width, height=height, plot=plot)


def _bands(bands: Sequence[Band], frame: Frame) -> list[str]:
    parts = []
    for n, band in enumerate(bands):
        start, end = frame.x(band.start), frame.x(band.end)
        room = (end - start) / CHAR
        label = next((text for text in (band.label, band.label.split(" · ")[0]) if len(text) <= room), "")
        parts.append(
            f'<rect class="band band-{n % 2}" x="{start:.1f}" y="{frame.top - 18}" width="{end - start:.1f}" '
            f'height="{frame.bottom - frame.top + 18}"/>'
            f'<text x="{(start + end) / 2:.1f}" y="{frame.top - 5}" text-anchor="middle">{escape(label)}</text>'
        )
    return parts


def _axes(frame: Frame, y_ticks: Sequence[float], x_title: str, y_title: str, width: int) -> list[str]:
    parts = [f'<text class="axis-title" x="0" y="12">{escape(y_title)}</text>']
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = frame.y(tick)
        parts.append(
            f'<line class="grid" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="y-tick" x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    x_ticks = nice_ticks(frame.x_low, frame.x_high, max(2, round((frame.right - frame.left) / 90)))
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        if frame.x_low <= tick <= frame.x_high:
            x = frame.x(tick)
            parts.append(
                f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.bottom}" y2="{frame.bottom + 4}"/>'
                f'<text class="x-tick" x="{x:.1f}" y="{frame.bottom + 18}" text-anchor="middle">{label}</text>'
            )
    end = frame.right
    parts.append(
        f'<text class="axis-title" x="{end:.1f}" y="{frame.bottom + 34}" text-anchor="end">{escape(x_title)}</text>'
    )
    return parts


def _line(series: Series, frame: Frame) -> list[str]:
    look = f"c{series.color}" + (" faint" if series.faint else "")
    parts: list[str] = []
    piece: list[tuple[float, float]] = []
    for x, y in [*zip(series.x, series.y, strict=True), (math.nan, math.nan)]:
        if math.isfinite(x) and math.isfinite(y):
            piece.append((frame.x(x), frame.y(y)))
            continue
        if len(piece) > 1:
            points = " ".join(f"{px:.1f},{py:.1f}" for px, py in piece)
            parts.append(f'<polyline class="{look}" points="{points}"/>')
        if piece and (series.dots or len(piece) == 1):  # a lone point would be invisible as a line
            parts += [f'<circle class="{look}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>' for px, py in piece]
        piece = []
    return parts


def _end_labels(series: Sequence[Series], frame: Frame) -> list[str]:
    ends = []
    for s in series:
        known = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        if s.name and known:
            ends.append((s, frame.x(known[-1][0]), frame.y(known[-1][1])))
    places = spread([y for _, _, y in ends], LINE, frame.top, frame.bottom)
    return [
        f'<text class="label c{s.color}" x="{x + 7:.1f}" y="{place + 4:.1f}">{escape(s.name)}</text>'
        for (s, x, _), place in zip(ends, places, strict=True)
    ]


# ---- heat map ------------------------------------------------------------------------------------------

HEAT_EDGES = (0.4, 0.625, 0.8, 0.91, 1.1, 1.25, 1.6, 2.5)  # each the inverse of its mirror image: 1/1.1 … 1/2.5


def heat_level(ratio: float) -> int:
    """0 … 8 for a ratio to what would be balanced; 4 is balanced within a tenth. Equal factors, equal steps."""
    return sum(ratio >= edge for edge in HEAT_EDGES)


def heat_map(
    rows: Sequence[Sequence[float]], *, id: str, title: str, description: str, row_height: int = 6, width: int = 240
) -> str:
    """Rows of ratios (1 = balanced), time to the right; one column of every row is one moment.

    The nine levels are one path each, runs of equal cells merged: small enough for forty layers on one page, and the
    colours stay with the style sheet.
    """
    num_columns = max(map(len, rows), default=0)
    paths: dict[int, list[str]] = {}
    for r, row in enumerate(rows):
        levels = [heat_level(v) if math.isfinite(v) else None for v in row]
        start = 0
        for end in range(1, len(levels) + 1):
            if end == len(levels) or levels[end] != levels[start]:
                level = levels[start]
                if level is not None:
                    paths.setdefault(level, []).append(f"M{start} {r}h{end - start}v1h{start - end}z")
                start = end
    cell = width / max(num_columns, 1)
    body = "".join(f'<path class="h{level}" d="{"".join(runs)}"/>' for level, runs in sorted(paths.items()))
    height = row_height * max(len(rows), 1)
    return svg(
        f'<rect class="nothing" width="{width}" height="{height}"/>'
        f'<g transform="scale({cell:.6g} {row_height})" shape-rendering="crispEdges">{body}</g>'
        f'<line class="cursor" y1="0" y2="{height}"/>',
        id=id,
        title=title,
        description=description,
        width=width,
        height=height,
        plot=f"0 {width} -0.5 {max(num_columns, 1) - 0.5}",
    )


# ---- bars ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    text: str
    ours: bool = False


def bars(items: Sequence[Bar], *, id: str, title: str, description: str, width: int = 520) -> str:
    """Horizontal bars from zero with name and value written out; a hairline carries our own value to the others."""
    step = 34
    left = 14 + CHAR * 1.2 * max((len(i.name) for i in items), default=0)
    room = width - left - 64
    longest = max([i.value for i in items if math.isfinite(i.value) and i.value > 0], default=1.0)
    body = []
    for n, item in enumerate(items):
        y = n * step + 4
        length = max(0.0, item.value / longest * room) if math.isfinite(item.value) else 0.0
        look = "ours" if item.ours else "other"
        body.append(
            f'<text class="bar-name {look}" x="{left - 10:.1f}" y="{y + 17}" text-anchor="end">'
            f"{escape(item.name)}</text>"
            f'<rect class="bar {look}" x="{left:.1f}" y="{y}" width="{length:.1f}" height="24" rx="2"/>'
            f'<text class="bar-value {look}" x="{left + length + 8:.1f}" y="{y + 17}">{escape(item.text)}</text>'
        )
    for item in items:
        if item.ours and math.isfinite(item.value):
            x = left + max(0.0, item.value / longest * room)
            body.append(f'<line class="moment" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{len(items) * step}"/>')
    height = max(len(items), 1) * step
    return svg("".join(body), id=id, title=title, description=description, width=width, height=height)


def svg(body: str, *, id: str, title: str, description: str, width: float, height: float, plot: str = "") -> str:
    """The element around a picture. `plot`: "left right x_low x_high", for the page's read-out under the pointer."""
    id = escape(id)
    data = f' data-plot="{plot}"' if plot else ""
    return (
        f'<svg role="img" aria-labelledby="{id}-title {id}-desc" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}"{data}>'
        f'<title id="{id}-title">{escape(title)}</title><desc id="{id}-desc">{escape(description)}</desc>{body}</svg>'
    )
