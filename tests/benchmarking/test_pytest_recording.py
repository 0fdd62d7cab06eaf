"""What pytest-benchmark gets from the suite: rounds, figures, and no more than what was selected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastprice.benchmarking.pytest_recording import extra_info, selected_values

TESTS = """
import pytest
from fastprice.benchmarking.pytest_recording import TIME, extra_info

pytestmark = pytest.mark.benchmark(timer=TIME)


@pytest.mark.parametrize("way", ["one", "two"])
def test_it(way, benchmark):
    benchmark.group = "both"
    benchmark.extra_info.update(extra_info({"peak_allocated": None}, cuda=False))
    TIME.record(benchmark, {"one": [1.0, 3.0, 2.0], "two": [4.0, 8.0, 6.0]}[way])
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), *arguments]
    # pytest-benchmark measures nothing in a process that looks like a worker of pytest-xdist, as this one may be.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_rounds_are_the_samples_and_files_are_compared(tmp_path: Path) -> None:
    (tmp_path / "test_them.py").write_text(TESTS)
    run(tmp_path, "--benchmark-json=first.json")
    found = json.loads((tmp_path / "first.json").read_text())["benchmarks"]
    assert [each["stats"]["data"] for each in found] == [[1.0, 3.0, 2.0], [4.0, 8.0, 6.0]]
    assert [each["stats"]["median"] for each in found] == [2.0, 6.0]
    assert {each["group"] for each in found} == {"both"}
    assert found[0]["extra_info"]["peak_allocated"] is None
    run(tmp_path, "--benchmark-save=kept")
    text = run(tmp_path, "--benchmark-compare=0001", "-k", "one").stdout
    assert "test_it[one] (0001_kept)" in text
    assert "test_it[two] (NOW)" not in text


def test_figures_are_medians_and_missing_ones_say_why() -> None:
    row = {"tokens_per_second": {"p50": 5.0, "p20": 4.0}, "peak_reserved": 7, "settings": {"attention": "sdpa"}}
    info = extra_info(row, cuda=True, host_peak=9)
    assert (info["tokens_per_second"], info["peak_reserved"], info["host_peak"]) == (5.0, 7, 9)
    assert (info["items_per_second"], info["attention"]) == (None, "sdpa")
    assert extra_info(row, cuda=False)["vram"] == "none: measured on a CPU"


def test_only_what_is_selected_is_measured() -> None:
    def item(function: str, **values: Any) -> Any:
        return SimpleNamespace(originalname=function, callspec=SimpleNamespace(params=values))

    items = [item("f", case=1, way="a"), item("g", case=1, way="z"), item("f", case=2, way="b"), SimpleNamespace()]
    items += [item("f", case=1, way="c"), item("f", case=1, way="a")]
    assert selected_values(items, "f", "way", case=1) == ["a", "c"]
    assert selected_values(items, "f", "way") == ["a", "b", "c"]
    with pytest.raises(KeyError):
        selected_values(items, "f", "no such parameter")
