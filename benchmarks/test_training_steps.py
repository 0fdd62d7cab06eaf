"""Training steps of fastprice and of every peer, through its own trainer; on CUDA each in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastprice.benchmarking.peers import PEERS, STOCK
from fastprice.benchmarking.pytest_recording import TIME
from fastprice.benchmarking.reporting.summaries import agreement
from fastprice.benchmarking.suite_run import SuiteRun

pytestmark = pytest.mark.benchmark(timer=TIME)

MODELS = ("llama-3.1-8b", "llama-3.2-1b") if torch.cuda.is_available() else ("nano",)
# The reference of the check first; the others as they stand in the table.
ORDER = [STOCK[0], *(peer for peer in PEERS if peer != STOCK[0])]


@pytest.fixture(scope="module")
def stock() -> dict[str, Any]:
    """The rows of the stock path by model, where it was selected."""
    return {}


@pytest.mark.parametrize("peer", ORDER)
@pytest.mark.parametrize("model", MODELS)
def test_training_step(model: str, peer: str, suite: SuiteRun, stock: dict[str, Any], ran: Any, record: Any) -> None:
    if peer.endswith("no-recompute") and not suite.plan.gpu:
        pytest.skip("on a CPU the whole runs compare it")
    row = ran(suite.step("steps", peer, model))
    more: dict[str, Any] = {"dtype": row["dtype"], "tokens_per_step": row["tokens_per_step"]}
    if peer == STOCK[0]:
        stock[model] = row
    elif model in stock:
        more["check"] = agreement(row, stock[model])
        assert more["check"]["ok"], more["check"]
    record(
        row["step_samples"],
        {**row, "host_peak": row["load_host_bytes"]},
        group=f"training step: {model}, {suite.plan.tokens} tokens, r={suite.plan.rank}",
        losses_of_equal_updates=row["trajectory"],
        **more,
    )
