from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarking.result_rows import static_row

from fastprice.benchmarking import main
from fastprice.benchmarking.static_figures import read_static, regressions, static_table, write_static
from fastprice.errors import DataError


def test_worse_machine_code_is_reported_and_better_is_not() -> None:
    before = [static_row(), static_row(target=80)]
    assert regressions(before, before) == []
    assert regressions(before, [static_row(instructions_per_element=6.0, registers=30)]) == []
    assert regressions(before, [static_row(instructions_per_element=6.5)]) == [], "within what does not matter"
    assert regressions(before, [static_row(instructions_per_element=7.0)]) == [
        "nf4 on sm_90: instructions per element 6.4 before, 7 now"
    ]
    assert regressions(before, [static_row(spills=1)]) == ["nf4 on sm_90: spills 0 before, 1 now"]
    assert regressions(before, [static_row("new")]) == ["new on sm_90 has no figures yet"]


def test_static_figures_are_written_and_read_again(tmp_path: Path) -> None:
    rows = [static_row(), static_row(target=80, registers=64)]
    write_static(tmp_path / "static.json", rows, "triton 3.6.0")
    assert read_static(tmp_path / "static.json") == ("triton 3.6.0", rows)
    assert "| nf4 | 6.40 | 128 | 1,024 | HGMMA | 64 | 0 |" in static_table(rows)
    (tmp_path / "static.json").write_text("{}")
    with pytest.raises(DataError, match="no static figures"):
        read_static(tmp_path / "static.json")


@pytest.mark.parametrize(("registers", "status"), [(40, 0), (80, 1)])
def test_the_check_compares_what_is_compiled_now_with_the_file(
    registers: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[dict[str, Any]] = [static_row()]

    def report(arguments: Sequence[str]) -> int:
        Path(arguments[-1]).write_text(json.dumps(compiled))
        return 0

    monkeypatch.setattr("fastprice_kernels.codegen.report.main", report)
    file = tmp_path / "static.json"
    assert main(["static", str(file)]) == 0
    assert f"written: {file}" in capsys.readouterr().out
    compiled[0]["registers"] = registers
    assert main(["static", str(file), "--check"]) == status
    assert ("registers 40 before, 80 now" in capsys.readouterr().err) is bool(status)
