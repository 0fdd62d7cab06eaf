"""Each figure is under its own heading in every form of the table: cells, terminal, Markdown, HTML report."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from fastprice.data.items import Item
from fastprice.evaluation.evaluate import Evaluation, evaluate_models
from fastprice.evaluation.report import write_report

TRUTHS = [100.0, 200.0, 300.0, 400.0]
GUESSES = [100.0, 200.0, 300.0, 200.0]
# By hand: errors 0, 0, 0 and -200; squared they are 40,000 against 50,000 about the mean price; three are hits.
EXPECTED = {"MAE $": "50.00", "RMSE $": "100.00", "RMSLE": "0.345", "MAPE %": "12.5", "R²": "0.200", "hits %": "75.0"}

Row = dict[str, str]


def from_cells(measured: Evaluation, _: Path) -> Row:
    return dict(zip(measured.headings(), [text for text, _ in measured.cells()[0]], strict=True))


def from_terminal(measured: Evaluation, _: Path) -> Row:
    return {str(column.header): str(next(iter(column.cells))) for column in measured.table().columns}


def from_markdown(measured: Evaluation, _: Path) -> Row:
    head, _, body = ([cell.strip() for cell in line.strip("|").split("|")] for line in measured.markdown().splitlines())
    return dict(zip(head, body, strict=True))


def from_report(measured: Evaluation, folder: Path) -> Row:
    written = write_report(folder / "r.html", title="t", evaluation=measured, curves=[], settings={}, counts={})
    page = written.read_text(encoding="utf-8")
    (table,) = re.findall(r'<table class="models">.*?</table>', page, re.DOTALL)
    cells = [unescape(text) for text in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", table)]
    return dict(zip(cells[: len(cells) // 2], cells[len(cells) // 2 :], strict=True))


@pytest.mark.parametrize("read", [from_cells, from_terminal, from_markdown, from_report])
def test_each_figure_is_under_its_heading(read: Callable[[Evaluation, Path], Row], tmp_path: Path) -> None:
    items = [Item(f"item {n}", price) for n, price in enumerate(TRUTHS)]
    row = read(evaluate_models({"a model": lambda texts: GUESSES}, items, resamples=20), tmp_path)
    assert row["model"] == "a model"
    assert {heading: row[heading].split(" ")[0] for heading in EXPECTED} == EXPECTED
