"""The report's charts: every item drawn, the right numbers, the page's colors, text alternatives, odd prices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tests.evaluation.pages import Page, charts, evaluation, written

from fastprice.data.items import Item
from fastprice.evaluation.evaluate import evaluate_models


def test_the_bands_have_every_item_once_and_average_to_the_mean_error(tmp_path: Path) -> None:
    measured = evaluation(500)
    html = written(tmp_path / "report.html", measured)
    table = html[html.index("The same as numbers") : html.index("<h2>Training")]
    rows = re.findall(
        r'<tr><th scope="row">[^<]*</th><td class="number">([\d,]+)</td><td class="number">\$([\d,.]+)', table
    )
    counts, errors = (np.array([float(row[column].replace(",", "")) for row in rows]) for column in (0, 1))
    assert counts.sum() == 500
    assert (counts >= 25).all()
    assert len(rows) >= 5
    assert (counts * errors).sum() / 500 == pytest.approx(measured.results[0].scores.mae, abs=0.01)


def test_bands_below_a_dollar_are_labeled_to_the_cent(tmp_path: Path) -> None:
    prices = [0.2, 0.3, 2.0, 2.6, 3.0, 4.0]
    items = [Item("x", price) for price in prices]
    text = Page(written(tmp_path / "r.html", evaluate_models({"m": lambda texts: prices}, items, resamples=5))).text
    for label in ("< $0.25", "$0.25–0.50", "$0.50–2.50", "≥ $2.50"):
        assert label in text


def test_every_item_is_a_dot_in_the_scatter(html: str) -> None:
    assert max(path.get("d", "").count("h0") for path in charts(html)[0].iter("path")) == 60


def test_charts_have_text_alternatives(html: str) -> None:
    for chart in charts(html):
        assert chart.get("role") == "img"
        assert len(chart.get("aria-label", "")) > 40


def test_charts_have_the_colors_of_the_page(tmp_path: Path) -> None:
    html = written(tmp_path / "report.html", evaluation(20, models=8))
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #\w+", drawn)
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= set(re.findall(r"--([\w-]+):", html))
    assert "prefers-color-scheme: dark" in html


def test_many_items_are_sampled_and_the_caption_says_so(tmp_path: Path) -> None:
    html = written(tmp_path / "report.html", evaluation(4_000, models=6))
    assert "2,000 of 4,000 items, chosen at random." in html
    assert max(path.get("d", "").count("h0") for path in charts(html)[0].iter("path")) == 2_000
    assert len(html.encode()) < 2**19


@pytest.mark.parametrize(
    ("prices", "guesses"),
    [
        ([10.0], [12.0]),
        ([10.0, 10.0, 10.0], [1.0, 10.0, 10.0]),
        ([0.01, 1e6], [0.0, 1e12]),
        ([13.0, 40.0, 20.0], [-5.0, 1e90, 20.0]),
        ([0.1, 0.25, 0.3, 0.7], [0.1, 0.1, 0.1, 0.1]),
    ],
    ids=["one item", "one price", "eight decades", "beyond the axes", "cents"],
)
def test_odd_sets(tmp_path: Path, prices: list[float], guesses: list[float]) -> None:
    items = [Item(f"item {price}", price) for price in prices]
    measured = evaluate_models({"odd": lambda texts: guesses, "exact": lambda texts: prices}, items, resamples=20)
    html = written(tmp_path / "report.html", measured, curves=[], notes=(), counts={}, settings={})
    assert "No loss or validation error was logged." in html
    assert not re.findall(r"[ \d(](?:nan|inf)[ ,.)]", Page(html).text)
    for chart in charts(html):
        assert "nan" not in "".join(path.get("d", "") for path in chart.iter("path"))
        assert [text for text in chart.iter("text") if "$" in (text.text or "")], "an axis without a price"


def test_estimates_beyond_the_axes_are_counted_in_the_caption(tmp_path: Path) -> None:
    measured = evaluate_models({"wild": lambda texts: [1e9, -4.0, 30.0]}, [Item("a", 10.0)] * 3, resamples=5)
    html = written(tmp_path / "report.html", measured)
    assert "On the edge: 3 estimates beyond the axes." in html
    assert html.count("$1e+09") >= 1


@pytest.mark.parametrize(
    ("curves", "panels"),
    [
        ([{"step": 1, "loss": 2.0}], 1),
        ([{"step": 5, "eval_mae": 50.0}], 1),
        ([{"step": 1, "loss": 2.0}, {"step": 1, "eval_mae": 50.0}], 2),
        ([{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"learning_rate": 0.1}], 0),
    ],
)
def test_training_curves_have_the_values_logged(
    tmp_path: Path, curves: list[Mapping[str, float | None]], panels: int
) -> None:
    html = written(tmp_path / "report.html", evaluation(20, models=1), curves=curves)
    training = html[html.index("<h2>Training") : html.index("largest errors")]
    shown = [name for name in (">training loss", ">validation error") if name in training]
    assert len(shown) == panels
    assert ("No loss or validation error was logged." in training) is (panels == 0)
