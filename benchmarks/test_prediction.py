"""Point estimates from the distribution, or off a head, beside `generate` and a regular expression."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fastprice.benchmarking.kernel_comparison import OURS
from fastprice.benchmarking.prediction import PREDICTION_WAYS, PredictionModel
from fastprice.benchmarking.pytest_recording import TIME, selected_values
from fastprice.benchmarking.suite_run import SuiteRun
from fastprice.benchmarking.timing import ratios

pytestmark = pytest.mark.benchmark(timer=TIME)

CUDA = torch.cuda.is_available()
GENERATE = "generate + regex"
# Of each way's speed to that of `generate`, by batch, on any CPU.
BATCHES = (1, 8, 64) if CUDA else (1, 8, 32)
AT_LEAST = {OURS: {1: 3.0, 8: 1.6, 32: 1.6}, "fastprice head": {1: 5.0, 8: 2.0, 32: 2.0}}


@pytest.fixture(scope="module")
def tuned(suite: SuiteRun) -> PredictionModel:
    folder = suite.folder(suite.plan.smallest)
    assert folder is not None
    return PredictionModel(folder)


@pytest.fixture(scope="module")
def rows() -> dict[int, dict[str, Any]]:
    return {}


@pytest.mark.parametrize("way", PREDICTION_WAYS)
@pytest.mark.parametrize("batch", BATCHES)
def test_prediction(
    batch: int,
    way: str,
    tuned: PredictionModel,
    suite: SuiteRun,
    rows: dict[int, dict[str, Any]],
    record: Any,
    hold: Any,
    request: pytest.FixtureRequest,
) -> None:
    if batch not in rows:
        ways = {*selected_values(request.session.items, "test_prediction", "way", batch=batch), GENERATE}
        items, seconds = (max(64, 4 * batch), 15.0) if CUDA else (max(4, batch), 2.0)
        clock = time.perf_counter if CUDA else time.process_time
        rows[batch] = tuned.compare(items=items, batch=batch, seconds=seconds, ways=ways, samples=True, clock=clock)
    row = rows[batch]
    assert row.get("status", "ok") == "ok", row.get("reason")
    samples = row["samples"]
    record(
        samples[way],
        {"items_per_second": row["items_per_second"][way]},
        group=f"prediction: {suite.plan.smallest}, batch {batch}",
        scorer=row["scorer"],
        clock="device" if CUDA else "processor time",
    )
    if way in AT_LEAST and not CUDA:
        hold(ratios(samples[GENERATE], samples[way]), at_least=AT_LEAST[way][batch])
