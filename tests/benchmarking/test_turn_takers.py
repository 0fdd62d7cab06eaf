"""Workers that take turns: one at a time, in order, and one that fails takes no more."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastprice.benchmarking.process_runner import ProcessRunner

WORKER = """
import json, sys, time
case = json.loads(sys.argv[1])
def row(**values):
    print("FASTPRICE-ROW " + json.dumps({"status": "ok", **values}), flush=True)
print("other output", flush=True)
if case.get("never"):
    time.sleep(60)
row(ready=True)
for number, line in enumerate(sys.stdin):
    began = time.monotonic()
    time.sleep(0.05)
    if case.get("fails") == number:
        row(status="failed", reason="no memory")
        break
    if case.get("dies") == number:
        print("last words", flush=True)
        sys.exit(3)
    if case.get("hangs") == number:
        time.sleep(60)
    row(began=began, ended=time.monotonic())
"""


@pytest.fixture
def runner(tmp_path: Path) -> ProcessRunner:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return ProcessRunner(tmp_path / "out", 1.0, quiet=True, worker=(sys.executable, str(script)))


def turns(runner: ProcessRunner, *cases: dict[str, Any], rounds: int = 3, timeout: float = 20.0) -> list[Any]:
    rows = runner.measure_in_turns("runs", [{"kind": "run", **case} for case in cases], rounds, timeout=timeout)
    assert rows == runner.rows
    return rows


def test_rounds_interleave_and_no_two_run_at_once(runner: ProcessRunner) -> None:
    rows = turns(runner, {"peer": "a"}, {"peer": "b"})
    assert [(row["round"], row["case"]["peer"]) for row in rows] == [
        (number, peer) for number in range(3) for peer in "ab"
    ]
    for before, after in pairwise(rows):
        assert before["ended"] <= after["began"]


def test_one_that_fails_or_dies_stops_no_other(runner: ProcessRunner) -> None:
    rows = turns(runner, {"peer": "a", "fails": 1}, {"peer": "b", "dies": 0}, {"peer": "c"})
    found = [(row["case"]["peer"], row["status"]) for row in rows]
    assert found == [
        ("a", "ok"), ("b", "failed"), ("c", "ok"), ("a", "failed"), ("c", "ok"), ("c", "ok"),
    ]  # fmt: skip
    assert rows[1]["reason"] == "ended with status 3: last words"
    assert rows[3]["reason"] == "no memory"
    assert "other output" in (runner.folder / "log.txt").read_text()


def test_one_that_hangs_is_stopped_after_its_time(runner: ProcessRunner) -> None:
    rows = turns(runner, {"peer": "a", "hangs": 0}, {"peer": "b"}, rounds=1, timeout=6.0)
    assert [(row["case"]["peer"], row["status"]) for row in rows] == [("a", "failed"), ("b", "ok")]
    assert rows[0]["reason"] == "stopped after 6 s"


def test_without_time_nothing_waits(runner: ProcessRunner) -> None:
    runner._minutes = 0.0
    rows = turns(runner, {"peer": "a"})
    assert [row["status"] for row in rows] == ["skipped"]
    json.dumps(rows)
