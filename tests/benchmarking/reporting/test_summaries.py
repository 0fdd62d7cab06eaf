from __future__ import annotations

import pytest
from tests.benchmarking.result_rows import LIMITS, kernel_row, result, step_row

from fastprice.benchmarking.reporting.summaries import agreement, summarize_kernels, summarize_steps
from fastprice.benchmarking.reporting.tables import markdown


def test_a_check_off_the_band_gives_no_ratio() -> None:
    stock = step_row("trl-packed", 1000.0)
    assert agreement(step_row("peft", 2000.0, loss=11.05), stock)["ok"]
    for wrong in ({"loss": 11.5}, {"norm": 2.3}, {"loss": float("nan")}):
        off = step_row("peft", 2000.0, **wrong)
        assert not agreement(off, stock)["ok"]
        entries = summarize_steps([stock, off], LIMITS)
        assert all(entry["ratio"] is None for entry in entries)
        assert "x as fast" not in markdown(result(stock, off))
        assert "check failed" in markdown(result(stock, off))


def test_ratios_are_of_the_best_fastprice_with_the_spread_of_rounds() -> None:
    rows = [
        step_row("peft", 1900.0),
        step_row("trl-packed", 1000.0),
        step_row("peft", 2100.0),
        step_row("trl-packed", 1100.0),
    ]
    stock, ours = summarize_steps(rows, LIMITS)
    assert ours["ratio"] is None
    assert stock["ratio"]["of"] == "peft"
    assert stock["ratio"]["mid"] == pytest.approx(2000 / 1050)
    assert stock["ratio"]["low"] == pytest.approx(1900 / 1100)
    assert stock["ratio"]["high"] == pytest.approx(2100 / 1000)
    assert ours["flop_utilization"] == pytest.approx(2000 * 4e9 / 1e14)
    assert stock["noisy"], "rounds that differ by 9.5 % are flagged"


def test_kernels_are_summarized_by_geometric_mean() -> None:
    (entry,) = summarize_kernels([kernel_row(1.0, 2.0), kernel_row(1.0, 0.5)])
    assert entry["mean"] == pytest.approx(1.0)
    assert entry["smallest"] == 0.5
