from __future__ import annotations

import pytest
from tests.benchmarking.result_rows import LIMITS, kernel_row, result, run_row, step_row

from fastprice.benchmarking.reporting.summaries import (
    agreement,
    run_agreement,
    summarize_kernels,
    summarize_runs,
    summarize_steps,
)
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


def test_short_cases_have_no_share_of_the_limit() -> None:
    short = {**kernel_row(1.0, 2.0), "floor_seconds": 39e-6, "share_of_limit": {"fastprice": 0.1}}
    (entry,) = summarize_kernels([kernel_row(1.0, 2.0), short])
    assert entry["share_of_limit"] == pytest.approx(0.8)
    assert entry["cases"] == 2
    (entry,) = summarize_kernels([short])
    assert entry["share_of_limit"] is None
    assert "| 2.00x | - |" in markdown(result(short))


def test_rates_are_medians_over_rounds() -> None:
    rows = [step_row("trl-packed", rate) for rate in (1000.0, 1100.0, 5000.0)]
    (entry,) = summarize_steps(rows, LIMITS)
    assert entry["tokens_per_second"] == 1100.0


def test_the_losses_of_equal_updates_are_compared_where_both_were_taken() -> None:
    stock = {**step_row("trl-packed", 9.0), "trajectory": [4.0, 2.0, 1.0]}
    ours = {**step_row("peft", 10.0), "trajectory": [4.0, 2.0, 1.1]}
    graphs = {**step_row("peft-graphs", 11.0), "trajectory": []}
    entries = {each["peer"]: each for each in summarize_steps([stock, ours, graphs], LIMITS)}
    assert entries["peft"]["trajectory_error"] == pytest.approx(0.1)
    assert entries["peft-graphs"]["trajectory_error"] is None
    text = markdown(result(stock, ours, graphs))
    assert "| 1.0e-01 | - |" in text


def test_a_run_may_differ_as_much_as_packing_makes_stock_runs_differ() -> None:
    losses = {"trl-packed": 3.0, "trl-padded": 2.8, "peft": 3.2}
    assert run_agreement(losses, before=6.0) == {"trl-packed": True, "trl-padded": True, "peft": True}
    assert not run_agreement({**losses, "peft": 3.3}, before=6.0)["peft"]
    assert not run_agreement({**losses, "trl-padded": 3.0}, before=6.0)["peft"], "stock runs that agree allow less"
    assert not run_agreement({**losses, "peft": float("nan")}, before=6.0)["peft"]
    assert not run_agreement(losses, before=2.9)["peft"], "a run must learn"
    assert not run_agreement({"peft": 3.0}, before=6.0)["peft"], "nothing to agree with"


def test_ratios_of_whole_runs_are_taken_round_by_round() -> None:
    rows = [run_row("peft", rate, number=number) for number, rate in enumerate((100.0, 25.0, 100.0))]
    rows += [run_row("trl-packed", rate, number=number) for number, rate in enumerate((50.0, 12.5, 40.0))]
    stock, ours = summarize_runs(rows)
    assert (stock["peer"], stock["ratio"]) == ("trl-packed", 2.0)
    assert ours["ratio"] is None
    assert "| trl-packed | sdpa | 80 | 40.0 |" in markdown(result(*rows, kind="cpu"))
    off = [{**row, "loss_after": 4.0} if row["peer"] == "peft" else row for row in rows]
    assert all(entry["ratio"] is None for entry in summarize_runs(off))
    assert "loss off" in markdown(result(*off))


def test_a_slower_attention_than_the_peers_best_is_starred() -> None:
    slow = {**step_row("trl-packed", 9.0), "settings": {"attention": "sdpa", "best_attention": False}}
    text = markdown(result(step_row("peft", 10.0), slow))
    assert "| trl-packed | sdpa * |" in text
    assert "ratio flatters fastprice" in text
    assert "flatters" not in markdown(result(step_row("peft", 10.0)))
