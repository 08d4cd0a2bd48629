"""How fast a training was, from its records: rates over all of it, with their spread.

`seconds` in a record excludes saves, validation and the time between two processes. A share above 1 is possible, since
the machine's rate was measured next to other work; the largest measurement on a machine holds for all of its intervals.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.report.text import is_number
from gristmill.train.log import Record


@dataclass(frozen=True)
class Interval:
    """Between two logged steps. `flops`: of the model, a second. `machine` tells machines apart."""

    seconds: float
    tokens: float
    flops: float | None
    measured_flops: float | None
    data_sheet_flops: float | None
    machine: str


@dataclass(frozen=True, kw_only=True)
class Speed:
    """`slow`, `fast`: tokens a second that a tenth of the time stayed below, and above; None for a single interval.

    mfu_measured: share of the rate of matrix products that was measured on the machine. mfu_data_sheet: share of the
    rate that the GPU's data sheet states. gemm_tflops: the largest rate measured on the last machine.
    """

    seconds: float | None = None
    tokens_per_second: float | None = None
    slow: float | None = None
    fast: float | None = None
    mfu_measured: float | None = None
    mfu_data_sheet: float | None = None
    gemm_tflops: float | None = None


def speed(records: Sequence[Record], machine: Mapping[str, Any]) -> Speed:
    """`records`: of kinds train and machine, in order. `machine`: of records that no machine record precedes."""
    intervals = list(_intervals(records, machine))
    if not intervals:
        return Speed()
    seconds = sum(i.seconds for i in intervals)
    rates = sorted((i.tokens / i.seconds, i.seconds) for i in intervals)
    best: dict[str, float] = {}
    for interval in intervals:
        if interval.measured_flops:
            best[interval.machine] = max(best.get(interval.machine, 0.0), interval.measured_flops)
    measured = best.get(intervals[-1].machine)
    return Speed(
        seconds=seconds,
        tokens_per_second=sum(i.tokens for i in intervals) / seconds,
        slow=_quantile(rates, 0.1) if len(rates) > 1 else None,
        fast=_quantile(rates, 0.9) if len(rates) > 1 else None,
        mfu_measured=_share([(i, best.get(i.machine)) for i in intervals]),
        mfu_data_sheet=_share([(i, i.data_sheet_flops) for i in intervals]),
        gemm_tflops=measured / 1e12 if measured else None,
    )


def _intervals(records: Sequence[Record], machine: Mapping[str, Any]) -> Iterator[Interval]:
    seconds = tokens = 0.0
    for record in records:
        if record["kind"] == "machine":
            machine = record["machine"]
        elif is_number(record.get("seconds")) and is_number(record.get("tokens")):
            passed, trained = record["seconds"] - seconds, record["tokens"] - tokens
            seconds, tokens = record["seconds"], record["tokens"]
            if passed > 0 and trained > 0:
                gemm = record.get("gemm_tflops", machine.get("gemm_tflops"))
                share, sheet = record.get("mfu_measured", record.get("mfu")), machine.get("data_sheet_tflops")
                measured = gemm * 1e12 if is_number(gemm) else None
                yield Interval(
                    seconds=passed,
                    tokens=trained,
                    flops=share * measured if measured and is_number(share) else None,
                    measured_flops=measured,
                    data_sheet_flops=sheet * 1e12 if is_number(sheet) else None,
                    machine=json.dumps({**machine, "gemm_tflops": None}, sort_keys=True, default=str),
                )


def _share(of: Sequence[tuple[Interval, float | None]]) -> float | None:
    """Operations done over operations possible; None where an interval's rate is not known."""
    done = possible = 0.0
    for interval, rate in of:
        if not rate or interval.flops is None:
            return None
        done += interval.flops * interval.seconds
        possible += rate * interval.seconds
    return done / possible


def _quantile(rates: Sequence[tuple[float, float]], share: float) -> float:
    """Of sorted (rate, seconds): the rate up to which `share` of the time is spent."""
    left = share * sum(seconds for _, seconds in rates)
    for rate, seconds in rates:
        left -= seconds
        if left <= 0:
            return rate
    return rates[-1][0]
