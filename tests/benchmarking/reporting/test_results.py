from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.benchmarking.result_rows import kernel_row, result, step_row

from fastprice.benchmarking.reporting.results import compare, find_results, load_result, result_path
from fastprice.errors import DataError

ABOUT = {"kind": "gpu", "device": "NVIDIA H200", "time": "2026-11-21T10:00:00+00:00", "commit": "abc123+changes"}


def test_verdicts_respect_noise() -> None:
    before = result(step_row("peft", 1000.0, noise=0.06), kernel_row(1.0, 2.0))
    near = result(step_row("peft", 1070.0, noise=0.06), kernel_row(1.02, 2.0))
    far = result(step_row("peft", 1200.0, noise=0.06), kernel_row(1.5, 2.0))
    assert [entry["verdict"] for entry in compare(before, near)] == ["same", "same"]
    assert [entry["verdict"] for entry in compare(before, far)] == ["faster", "slower"]
    with pytest.raises(DataError, match="two devices"):
        compare(before, result(device="Another GPU"))


def test_results_are_found_oldest_first_and_anything_else_is_refused(tmp_path: Path) -> None:
    for name, time in (("b", "2026-11-20"), ("a", "2026-11-21")):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(time=time)))
    assert [path.stem for path in find_results(tmp_path)] == ["b", "a"]
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match="is not a benchmark result"):
        load_result(tmp_path / "c.json")
    with pytest.raises(DataError, match="no benchmark results"):
        find_results(tmp_path / "nowhere")


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = result_path(tmp_path, ABOUT)
        path.write_text("{}")
        names.append(path.name)
    assert names == [
        "nvidia-h200-2026-11-21-abc123-changes.json",
        "nvidia-h200-2026-11-21-abc123-changes-2.json",
        "nvidia-h200-2026-11-21-abc123-changes-3.json",
    ]
    cpu = {**ABOUT, "kind": "cpu", "device": "CPU, some processor"}
    assert result_path(tmp_path, cpu).name.startswith("cpu-2026")
