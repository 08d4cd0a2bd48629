"""The report's headline figures, in one table, and report.json.

To add a figure, add it to `FIGURES`: report.json and the page's list of facts follow from the table. A value that
training has to compute comes from its records (`train.figures.Step`) or its summary (`train.figures.Figures.summary`).
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.hub.agreement import TOLERANCE
from gristmill.report.collect import BASELINES, Report, baselines, by_source, held_out, licenses, validation_bits
from gristmill.report.text import bits, count, duration, is_number, percent, scientific, short
from gristmill.train.log import MFU_ABOVE_1


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number under its name in report.json. With a `label`, the page shows it among its facts.

    read: returns the value, or None while it is unknown. form, note: how the page shows it, and a remark.
    """

    key: str
    read: Callable[[Report], object]
    label: str = ""
    form: Callable[[float], str] = short
    note: Callable[[Report], str] = lambda report: ""

    def value(self, report: Report) -> float | None:
        value = self.read(report)
        return value if is_number(value) else None


def _trained(report: Report, summary: str, record: str = "") -> object:
    """A value of the checkpoint's summary; before there is a checkpoint, of the last record."""
    last = report.train[-1] if report.train else {}
    return report.metrics("train").get(summary, last.get(record))


def _spread(report: Report) -> str:
    slow, fast = report.speed.slow, report.speed.fast
    return f"between {count(slow)} and {count(fast)} in 80% of the time" if slow and fast else ""


def _active_share(report: Report) -> str:
    found = figures(report)
    active, total = found["active_params"], found["total_params"]
    return f"{percent(active / total)} of all" if active and total else ""


def _agreement(report: Report) -> str:
    difference = figures(report)["export_max_logit_diff"]
    if difference is not None and difference <= TOLERANCE:
        return "agrees with transformers"
    return f"too much: above {scientific(TOLERANCE)}"


def _peak(report: Report, share: float | None, rate: str, source: str) -> str:
    """Describe the rate that a model FLOP utilization is a share of, and why it can exceed 100%."""
    peak = report.machine.get(rate)
    of_peak = f"of {peak:.3g} TFLOP/s {source}" if is_number(peak) else f"of the rate {source}"
    return f"{of_peak}; {MFU_ABOVE_1}" if share and share > 1 else of_peak


def _baseline(name: str) -> Figure:
    return Figure(key=f"{name}_bits_per_byte", read=lambda report: baselines(report)[name].get("all"))


FIGURES = (
    Figure(key="total_params", read=lambda r: _trained(r, "total_params"), label="Parameters"),
    Figure(
        key="active_params",
        read=lambda r: _trained(r, "active_params"),
        label="Active per token",
        note=_active_share,
    ),
    Figure(key="train_tokens", read=lambda r: _trained(r, "train_tokens", "tokens"), label="Training tokens"),
    Figure(key="train_seconds", read=lambda r: r.speed.seconds, label="Training time", form=duration),
    Figure(
        key="tokens_per_second",
        read=lambda r: r.speed.tokens_per_second,
        label="Tokens per second",
        form=count,
        note=_spread,
    ),
    Figure(
        key="mfu_measured",
        read=lambda r: r.speed.mfu_measured,
        label="MFU, measured rate",
        form=lambda value: percent(value, 1),
        note=lambda r: _peak(r, r.speed.mfu_measured, "gemm_tflops", "measured in matrix products"),
    ),
    Figure(
        key="mfu_data_sheet",
        read=lambda r: r.speed.mfu_data_sheet,
        label="MFU, data sheet",
        form=lambda value: percent(value, 1),
        note=lambda r: _peak(r, r.speed.mfu_data_sheet, "data_sheet_tflops", "by the data sheet"),
    ),
    Figure(
        key="final_loss",
        read=lambda r: _trained(r, "final_loss", "loss"),
        label="Last training loss",
        form=lambda value: f"{value:.3f}",
        note=lambda r: "nats per token",
    ),
    Figure(
        key="validation_bits_per_byte",
        read=lambda r: validation_bits(r).get("all"),
        label="Validation",
        form=bits,
        note=lambda r: "bits per byte",
    ),
    Figure(key="held_out_bits_per_byte", read=lambda r: held_out(r).get("all")),
    *map(_baseline, BASELINES),
    Figure(
        key="export_max_logit_diff",
        read=lambda r: r.metrics("export").get("export_max_logit_diff"),
        label="Export, largest logit difference",
        form=scientific,
        note=_agreement,
    ),
)


def figures(report: Report) -> dict[str, float | None]:
    """Return the headline figures under their names in report.json; None where one is unknown.

    Bits per byte are over all sources. Rates are over the whole training, without saves and validation.
    """
    return {figure.key: figure.value(report) for figure in FIGURES}


def facts(report: Report) -> list[tuple[str, float, str, str, str]]:
    """Return the known figures that the page shows: (key, exact value, label, as shown, note)."""
    known = [(figure, figure.value(report)) for figure in FIGURES if figure.label]
    return [
        (figure.key, value, figure.label, figure.form(value), figure.note(report))
        for figure, value in known
        if value is not None
    ]


def mfu_note(report: Report) -> str | None:
    """Explain a model FLOP utilization above 100%; None where there is none."""
    shares = (report.speed.mfu_measured, report.speed.mfu_data_sheet)
    return MFU_ABOVE_1 if any(share is not None and share > 1 for share in shares) else None


def to_json(report: Report) -> dict[str, Any]:
    """Return the content of report.json: the headline figures, then details in groups."""
    said = {
        "name": report.name,
        "finished": not report.missing,
        "missing_stages": report.missing,
        **({"skipped_stages": dict(report.skipped)} if report.skipped else {}),
        **figures(report),
        "tokens_per_second_spread": {"slow": report.speed.slow, "fast": report.speed.fast},
        "mfu_note": mfu_note(report),
        "held_out_by_source": by_source(held_out(report)),
        "validation_by_source": by_source(validation_bits(report)),
        "baselines_by_source": {name: by_source(bits) for name, bits in baselines(report).items()},
        "parse_share": (report.evaluation or {}).get("parse_share"),
        "corpus": {
            "sources": report.stages["corpus"].manifest["sources"] if "corpus" in report.stages else {},
            "licenses": licenses(report),
            **{name: report.metrics("corpus").get(name, {}) for name in ("splits", "dropped")},
        },
        "stages": {
            name: {
                "path": Path(os.path.relpath(stage.path, report.run)).as_posix(),
                "key": stage.key,
                "content": stage.content,
                "seconds": report.seconds.get(name),
            }
            for name, stage in report.stages.items()
        },
        "machine": dict(report.machine),
        "recipe": dict(report.recipe),
    }
    return {name: _plain(value) for name, value in said.items()}


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
