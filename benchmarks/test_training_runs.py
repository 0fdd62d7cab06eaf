"""Whole training runs: fastprice beside stock TRL + PEFT, and Unsloth on CUDA: the same texts, as many tokens a step.

Every peer has a process of its own, which waits while another runs; rounds interleave.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastprice.benchmarking.peers import RUN_PEERS
from fastprice.benchmarking.pytest_recording import TIME, selected_values
from fastprice.benchmarking.reporting.summaries import summarize_runs
from fastprice.benchmarking.suite_run import SuiteRun
from fastprice.benchmarking.timing import ratios

pytestmark = pytest.mark.benchmark(timer=TIME)
# Of fastprice's speed to the peer's, on any CPU.
AT_LEAST = {
    "trl-packed": 1.2, "trl-packed-no-recompute": 1.05, "trl-padded": 1.2, "trl-padded-no-recompute": 1.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(suite: SuiteRun, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rows of all rounds of the selected peers, and of fastprice."""
    chosen = selected_values(request.session.items, "test_training_run", "peer")
    return suite.training_runs([peer for peer in RUN_PEERS if peer in chosen or peer == "peft"])


@pytest.mark.parametrize("peer", RUN_PEERS)
def test_training_run(peer: str, rows: list[dict[str, Any]], ran: Any, record: Any, hold: Any) -> None:
    rounds = [ran(row) for row in rows if row["case"]["peer"] == peer]
    entries = {entry["peer"]: entry for entry in summarize_runs(rows)}
    entry = entries[peer]
    plan = rounds[0]["case"]
    record(
        [row["train_seconds"] for row in rounds],
        {**rounds[-1], **{name: entry[name] for name in ("items_per_second", "tokens_per_second", "host_peak")}},
        group=f"whole run: {plan['model']}, {entry['items']} texts, {plan['tokens']} tokens a step",
        steps=entry["steps"],
        loss_before=entry["loss_before"],
        loss_after=entry["loss_after"],
    )
    if any(name in entries for name in AT_LEAST):  # else there is no stock run to agree with
        assert entry["ok"], {name: each["loss_after"] for name, each in entries.items()}
    if peer in AT_LEAST:
        ours = [ran(row) for row in rows if row["case"]["peer"] == "peft"]
        steps = {name: entries[name]["steps"] for name in ("peft", peer)}
        assert max(steps.values()) <= 1.2 * min(steps.values()), f"other numbers of steps: {steps}"
        found = ratios([row["train_seconds"] for row in rounds], [row["train_seconds"] for row in ours])
        hold(found, at_least=AT_LEAST[peer])
