from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.benchmarking.result_rows import kernel_row, result, static_row, step_row

from fastprice.benchmarking import main
from fastprice.benchmarking.reporting.page import write_page
from fastprice.benchmarking.reporting.tables import markdown, paste_line
from fastprice.benchmarking.static_figures import write_static


def test_a_cpu_result_says_so_wherever_it_is_shown(tmp_path: Path) -> None:
    cpu = result(step_row("peft", 10.0), step_row("trl-packed", 9.0), kind="cpu", device="CPU, x")
    assert "no GPU figure" in markdown(cpu)
    assert "no GPU figure" in paste_line(cpu)
    page = write_page(cpu, tmp_path / "page.html").read_text()
    assert "Nothing on this page says how fast fastprice is on a GPU" in page
    assert "Nothing on this page" not in write_page(result(step_row("peft", 10.0)), tmp_path / "gpu.html").read_text()


def test_the_page_plots_what_was_measured_and_escapes_the_rest(tmp_path: Path) -> None:
    measured = result(step_row("peft", 10.0), step_row("trl-packed", 9.0), kernel_row(1.0, 2.0), device="<b>GPU</b>")
    page = write_page(measured, tmp_path / "page.html", measured).read_text()
    assert page.count("data:image/svg+xml") == 4
    assert "<b>GPU</b>" not in page
    assert "Arithmetic limits (not measured)" in page
    empty = write_page(result(), tmp_path / "empty.html").read_text()
    assert "data:image" not in empty


def test_static_figures_are_said_to_be_compiled_not_measured(tmp_path: Path) -> None:
    page = write_page(result(step_row("peft", 10.0)), tmp_path / "page.html", static=[static_row()]).read_text()
    assert "compiled, not measured" in page


def test_the_report_compares_the_newest_result_with_the_one_before_and_says_where_the_page_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for time, rate in (("2026-11-20", 1000.0), ("2026-11-21", 2000.0)):
        (results / f"{time}.json").write_text(json.dumps(result(step_row("peft", rate), time=time)))
    write_static(tmp_path / "static.json", [static_row()], "triton 3.6.0")
    assert main(["report", str(results)]) == 0
    out = capsys.readouterr().out
    assert "Since 2026-11-20, commit abc" in out
    assert "| 2.000 |" in out
    assert "| faster |" in out
    assert out.endswith(f"report: {results / 'report.html'}\n")
    assert "compiled, not measured" in (results / "report.html").read_text()
