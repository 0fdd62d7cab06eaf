"""Two processes for the kernel tests: one with the Triton compiler, one with the Triton interpreter.

TRITON_INTERPRET must be set before triton is imported, and turns every kernel of the process into an interpreted one.
So the pytest process never sets it: tests marked `interpreter` run, all together, in one child pytest that has it set,
and each reports its own result here. Tests without the mark (references, dispatch, machine code) run as usual.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

_RESULTS_FILE = "FASTPRICE_INTERPRETER_RESULTS"
_RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs kernel bodies on CPU tensors, under TRITON_INTERPRET=1")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Stands in for the body of an `interpreter` test: shows what the child process said of it."""
    if pyfuncitem.get_closest_marker("interpreter") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    stash = pyfuncitem.session.stash
    if _RESULTS not in stash:
        stash[_RESULTS] = _run_child(pyfuncitem.session)
    results = stash[_RESULTS]
    outcome, text = results["tests"].get(pyfuncitem.nodeid, ("failed", results["output"]))
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(f"in the Triton interpreter:\n{text}", pytrace=False)
    return True


def _run_child(session: pytest.Session) -> dict[str, Any]:
    chosen = [item.nodeid for item in session.items if item.get_closest_marker("interpreter") is not None]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        child = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
            cwd=session.config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", _RESULTS_FILE: str(results)},
            capture_output=True,
            text=True,
        )
        tests = json.loads(results.read_text()) if results.exists() else {}
    return {"tests": tests, "output": child.stdout[-4000:] + child.stderr[-4000:]}


_reports: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: records each test's worst outcome over set-up, call and tear-down."""
    if _reports.get(report.nodeid, ("passed", ""))[0] == "passed":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _reports[report.nodeid] = (report.outcome, text)


def pytest_sessionfinish() -> None:
    if _RESULTS_FILE in os.environ:
        Path(os.environ[_RESULTS_FILE]).write_text(json.dumps(_reports))
