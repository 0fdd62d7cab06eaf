from __future__ import annotations

import subprocess
from pathlib import Path

from fastprice.benchmarking.pytest_run import outcome_row, pytest_command


def test_outcomes_are_counted_and_a_failed_test_fails_the_row(tmp_path: Path) -> None:
    def run(body: str) -> dict[str, object]:
        (tmp_path / "test_x.py").write_text(f"import pytest\n{body}")
        done = subprocess.run(pytest_command([str(tmp_path)]), capture_output=True, text=True, timeout=60)
        return outcome_row(done.returncode, done.stdout)

    green = "@pytest.mark.parametrize('x', [1, 2])\ndef test_good(x): pass\n"
    skipped = "@pytest.mark.skip(reason='no')\ndef test_left_out(): pass\n"
    assert run(green + skipped) == {"status": "ok", "counts": {"passed": 2, "skipped": 1}}
    red = run(green + "def test_bad(): assert 1 == 2\n")
    assert red["status"] == "failed"
    assert red["counts"] == {"passed": 2, "failed": 1}
    assert "test_bad" in str(red["reason"])
    assert run(skipped)["status"] == "skipped"
    assert run("import nothing_of_that_name")["status"] == "failed"


def test_what_passed_before_the_time_was_over_is_counted() -> None:
    row = outcome_row(124, "tests/gpu/test_x.py::test_a PASSED [ 10%]\ntests/gpu/test_x.py::test_b ")
    assert row["counts"] == {"passed": 1}
    assert "out of time" in row["reason"]
