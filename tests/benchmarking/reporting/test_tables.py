from __future__ import annotations

import copy

import pytest
from tests.benchmarking.result_rows import result, step_row

from fastprice.benchmarking.reporting.tables import limits_table, markdown


def test_phases_are_shares_of_the_step() -> None:
    unseen = {**step_row("trl-packed", 9.0), "phase_seconds": {}}
    text = markdown(result(step_row("peft", 10.0), unseen))
    assert "| peft | 30% | 60% | 10% | 12.0 s | 5.00 GiB |" in text
    assert "| trl-packed | - | - | - | 12.0 s | 5.00 GiB |" in text


def test_arithmetic_ceilings_match_the_known_ones() -> None:
    table = limits_table(["llama-3.1-8b"])
    # 26.4 k and 5.5 k tokens/s at 4,096 tokens, by an independent calculation.
    _, _, row = table.splitlines()
    h200, rtx4090 = (float(cell.replace(",", "")) for cell in row.strip("|").split("|")[2:])
    assert h200 == pytest.approx(26_400, rel=0.03)
    assert rtx4090 == pytest.approx(5_500, rel=0.03)


def test_tables_hold_for_rows_that_failed() -> None:
    failed = {"stage": "steps", "case": {"kind": "step", "peer": "unsloth"}, "status": "failed", "reason": "no CUDA"}
    whole = result(copy.deepcopy(failed), step_row("peft", 10.0))
    assert "peft" in markdown(whole)
    assert "unsloth |" not in markdown(whole)
