"""Loading a 4-bit model, as fastprice, stock transformers and Unsloth load it; on CUDA each in its own process."""

from __future__ import annotations

from typing import Any

import pytest

from fastprice.benchmarking.peers import LOADING_WAYS
from fastprice.benchmarking.pytest_recording import TIME
from fastprice.benchmarking.suite_run import SuiteRun

pytestmark = pytest.mark.benchmark(timer=TIME)


@pytest.mark.parametrize("way", LOADING_WAYS)
def test_loading(way: str, suite: SuiteRun, ran: Any, record: Any) -> None:
    rounds = [ran(row) for row in suite.loading(way)]
    assert len(rounds) == suite.plan.load_rounds
    first, *later = rounds
    record(
        [row["load_seconds"] for row in later],
        {**later[-1], "host_peak": max(row["host_peak"] for row in rounds)},
        group=f"loading: {suite.plan.models[0]}",
        first_seconds=first["load_seconds"],
        own_host_peak=later[-1]["own_host_peak"],
    )
