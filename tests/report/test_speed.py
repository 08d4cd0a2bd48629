"""Rates over a whole training, compared with sums by hand."""

import json
import random
from pathlib import Path

import pytest
from fake_run import fake_run

from gristmill.report import collect, to_html, to_json
from gristmill.report.speed import Speed, speed

MACHINE = {"cpu": "A", "gemm_tflops": 2.0}


def record(step: int, tokens: float, seconds: float, share: float = 0.5, gemm: float = 2.0) -> dict:
    """`tokens_per_second` of the last interval is a decoy."""
    kinds = {"kind": "train", "step": step, "tokens_per_second": 1.0}
    return kinds | {"tokens": tokens, "seconds": seconds, "mfu_measured": share, "gemm_tflops": gemm}


def test_the_rate_is_all_tokens_over_all_seconds_and_the_spread_is_by_time() -> None:
    rng = random.Random(5)
    tokens = seconds = 0.0
    records, rates = [], []
    for step in range(1, 201):
        passed = rng.uniform(0.1, 3.0)
        tokens, seconds = tokens + 1000, seconds + passed
        records.append(record(step, tokens, seconds))
        rates += [1000 / passed] * round(passed * 1000)  # a sample a millisecond
    found = speed(records, MACHINE)
    rates.sort()
    assert found.tokens_per_second == pytest.approx(200_000 / seconds)
    assert found.slow == pytest.approx(rates[len(rates) // 10], rel=0.02)
    assert found.fast == pytest.approx(rates[len(rates) * 9 // 10], rel=0.02)


def test_what_is_between_two_processes_does_not_count() -> None:
    whole = [record(step, step * 10, step * 2.0) for step in range(1, 9)]
    machine = {"kind": "machine", "step": 0, "machine": MACHINE}
    resumed = [machine, *whole[:4], {**machine, "step": 4}, *whole[4:]]
    assert speed(resumed, {}) == speed(whole, MACHINE)
    assert speed(resumed, {}).tokens_per_second == 5.0


@pytest.mark.parametrize("records", [[], [record(0, 0, 0.0)], [{"kind": "train", "step": 1}]])
def test_a_training_without_a_finished_interval_has_no_rate(records: list[dict]) -> None:
    assert speed(records, MACHINE) == Speed()


def test_one_interval_has_a_rate_and_no_spread() -> None:
    found = speed([record(1, 64, 2.0)], MACHINE)
    assert (found.tokens_per_second, found.slow, found.fast) == (32.0, None, None)


def test_the_largest_measured_rate_of_a_machine_holds_for_all_its_intervals() -> None:
    """1.5 TFLOP/s were done for 10 s; the first measurement was next to other work and says 1.0, a later one 3.0."""
    records = [record(1, 10, 5.0, share=1.5, gemm=1.0), record(2, 20, 10.0, share=0.5, gemm=3.0)]
    found = speed(records, MACHINE)
    assert found.mfu_measured == pytest.approx(0.5)
    assert found.gemm_tflops == 3.0


def test_each_machine_is_compared_with_its_own_rates() -> None:
    fast = {"cpu": "B", "gemm_tflops": 8.0, "data_sheet_tflops": 10.0}
    slow = {"cpu": "A", "gemm_tflops": 2.0, "data_sheet_tflops": 4.0}
    records = [
        {"kind": "machine", "step": 0, "machine": slow},
        record(1, 10, 10.0, share=0.5, gemm=2.0),  # 1 TFLOP/s for 10 s
        {"kind": "machine", "step": 1, "machine": fast},
        record(2, 30, 15.0, share=0.5, gemm=8.0),  # 4 TFLOP/s for 5 s
    ]
    found = speed(records, {})
    assert found.mfu_measured == pytest.approx(0.5)
    assert found.mfu_data_sheet == pytest.approx((1 * 10 + 4 * 5) / (4 * 10 + 10 * 5))
    assert found.gemm_tflops == 8.0


def report_of(path: Path, share: float, sheet: float | None = None) -> tuple[dict, str]:
    run = fake_run(path, steps=40)
    machine = {
        "kind": "machine",
        "step": 0,
        "machine": {"gemm_tflops": 2.0} | ({"data_sheet_tflops": sheet} if sheet else {}),
    }
    records = [machine, *(record(step, step * 100.0, step * 1.0, share) for step in range(1, 41))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    report = collect(run.path, **run.arguments | {"machine": machine["machine"]})
    return to_json(report), to_html(report)


def test_both_definitions_have_a_name_each(tmp_path: Path) -> None:
    said, page = report_of(tmp_path / "a", 0.5, sheet=4.0)
    assert (said["mfu_measured"], said["mfu_data_sheet"]) == pytest.approx((0.5, 0.25))
    assert said["mfu_note"] is None
    assert "MFU, measured rate" in page
    assert "MFU, data sheet" in page
    assert "above 100%" not in page
    assert said["tokens_per_second"] == 100.0
    assert said["tokens_per_second_spread"] == {"slow": 100.0, "fast": 100.0}


def test_a_share_above_1_is_explained(tmp_path: Path) -> None:
    said, page = report_of(tmp_path / "a", 1.28)
    assert said["mfu_measured"] == pytest.approx(1.28)
    assert said["mfu_data_sheet"] is None
    assert said["mfu_note"].startswith("above 100%: the rate it is compared with was measured next to other work")
    assert said["mfu_note"] in page
