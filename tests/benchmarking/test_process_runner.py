"""Every row is written and every file is whole, whatever the workers do."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastprice.benchmarking.process_runner import ProcessRunner

ABOUT = {"kind": "gpu", "device": "NVIDIA H200", "time": "2026-11-21T10:00:00+00:00", "commit": "abc123+changes"}
WORKER = """
import json, subprocess, sys, time
case = json.loads(sys.argv[1])
print("other output", flush=True)
for number in range(case["rows"]):
    print('FASTPRICE-ROW ' + json.dumps({"status": "ok", "number": number}), flush=True)
if case.get("hang"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print('FASTPRICE-ROW ' + json.dumps({"status": "ok", "child": child.pid}), flush=True)
    time.sleep(60)
print("last line", file=sys.stderr)
sys.exit(case.get("status", 0))
"""


@pytest.fixture
def runner(tmp_path: Path) -> ProcessRunner:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    made = ProcessRunner(tmp_path / "out", 1.0, quiet=True, worker=(sys.executable, str(script)))
    made.environment = dict(ABOUT)
    return made


def written(runner: ProcessRunner) -> list[dict[str, Any]]:
    assert runner.path is not None
    return list(json.loads(runner.path.read_text())["rows"])


def test_rows_are_written_with_their_case(runner: ProcessRunner) -> None:
    rows = runner.measure("steps", {"rows": 2, "kind": "x"}, timeout=20)
    assert [row["number"] for row in rows] == [0, 1]
    assert rows[0]["stage"] == "steps"
    assert rows[0]["case"] == {"rows": 2, "kind": "x"}
    assert written(runner) == rows


def test_a_worker_that_dies_leaves_its_rows_and_its_last_line(runner: ProcessRunner) -> None:
    rows = runner.measure("steps", {"rows": 1, "status": 3}, timeout=20)
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert "status 3: last line" in rows[-1]["reason"]
    assert "other output" in (runner.folder / "log.txt").read_text()
    assert written(runner) == rows


def test_a_worker_that_prints_no_row_is_a_failure(runner: ProcessRunner) -> None:
    (row,) = runner.measure("steps", {"rows": 0}, timeout=20)
    assert row["reason"] == "printed no row"


def test_a_worker_that_hangs_is_killed_with_its_children(runner: ProcessRunner) -> None:
    rows = runner.measure("steps", {"rows": 1, "hang": True}, timeout=5)
    assert rows[-1]["reason"] == "stopped after 5 s"
    child = next(row["child"] for row in rows if "child" in row)
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def test_nothing_starts_when_the_time_is_over(runner: ProcessRunner) -> None:
    runner._minutes = 0.0
    (row,) = runner.measure("steps", {"rows": 1}, timeout=20)
    assert row["status"] == "skipped"
    assert runner.call("tests", [sys.executable, "-c", "print(1)"], timeout=20)[0] == 124


def test_other_commands_give_their_status_and_their_end(runner: ProcessRunner) -> None:
    status, tail = runner.call("tests", [sys.executable, "-c", "print('3 passed'); raise SystemExit(1)"], timeout=20)
    assert status == 1
    assert "3 passed" in tail
    assert runner.call("tests", [sys.executable, "-c", "import time; time.sleep(60)"], timeout=5)[0] == 124


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False
