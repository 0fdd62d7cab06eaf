"""A run of pytest as one row of a result: how many tests passed, failed and were skipped."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["outcome_row", "pytest_command"]

_OUTCOME = re.compile(r"::.* (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b")
_NO_TESTS = 5  # pytest's exit status when none was selected


def pytest_command(arguments: Sequence[str]) -> list[str]:
    """The command that runs pytest with `arguments` and prints a line for each test.

    Warnings are not errors, whatever the configuration says: other versions of the libraries have others.
    """
    options = ["-v", "--tb=line", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    return [sys.executable, "-m", "pytest", *arguments, *options]


def outcome_row(status: int, output: str) -> dict[str, Any]:
    """The row of a run that ended with `status`, 124 when it was stopped; what ran before that is counted."""
    outcomes = _OUTCOME.findall(output)
    counts = {name.lower(): outcomes.count(name) for name in dict.fromkeys(outcomes)}
    failures = [line.strip()[:160] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if status == 124:
        return {"counts": counts, "status": "failed", "reason": f"stopped: out of time after {counts}"}
    if status not in (0, _NO_TESTS):
        last_line = [line.strip() for line in output.splitlines() if line.strip()][-1:]
        reason = f"{counts}: {'; '.join(failures or last_line)}"
        return {"counts": counts, "status": "failed", "reason": reason[:800]}
    if not counts.get("passed"):
        return {"counts": counts, "status": "skipped", "reason": f"no test ran here: {counts}"}
    return {"counts": counts, "status": "ok"}
