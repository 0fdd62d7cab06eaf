"""The plot of a comparison: the figures of the table, in gray, without overlapping labels."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from fastprice import DataError
from fastprice.evaluation.metrics import score
from fastprice.prompting.compare import StrategyComparison, StrategyResult
from fastprice.prompting.plot import draw_comparison, plot_comparison

NAMES = ["zero-shot", "few-shot:4", "few-shot:16", "retrieval:4", "retrieval:16", "retrieval:4:embeddings",
         "chaining", "tools"]  # fmt: skip
BASELINES = ["constant (median)", "median of retrieval:4", "median of retrieval:16"]


def comparison_of(names: list[str], *, spread: float, best: str, criterion: str = "mae") -> StrategyComparison:
    """`names` and the baselines, their errors `spread` apart, `best` with the least."""
    random = np.random.default_rng(0)
    truths = np.exp(random.normal(4.5, 1, 120)).clip(2, 900)
    results = []
    for place, name in enumerate([*names, *BASELINES]):
        noise = 0.1 if name == best else 0.5 + spread * place
        guesses = (truths * np.exp(random.normal(0, noise, len(truths)))).clip(1, 999)
        cost = {"prompt_tokens": 60 + 200 * place, "generated_tokens": 12.5 * (name in NAMES[-2:])}
        options = {"is_baseline": True} if name in BASELINES else cost
        results.append(StrategyResult(name, guesses, score(truths, guesses), 0.01 + 10.0 * place, 1.0, **options))  # type: ignore[arg-type]
    results.sort(key=lambda result: float(result.scores.mae))
    return StrategyComparison(truths, results, criterion)


@pytest.mark.parametrize(
    ("names", "spread", "best"),
    [
        (NAMES, 0.05, "tools"),
        (NAMES, 0.05, "median of retrieval:4"),
        (NAMES, 0.0, "constant (median)"),
        (NAMES[:1], 0.1, "zero-shot"),
        (NAMES[:2], 0.1, "few-shot:4"),
    ],
)
def test_no_label_overlaps_another_or_leaves_the_figure(names: list[str], spread: float, best: str) -> None:
    figure = draw_comparison(comparison_of(names, spread=spread, best=best))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    texts = []
    for axes in figure.axes:
        left, right = axes.get_xlim()
        ticks = [text for text in axes.get_xticklabels() if left <= text.get_position()[0] <= right]
        ticks += axes.get_yticklabels() if axes is figure.axes[0] else []  # the other panels share them
        texts += [text for text in [axes.title, axes.xaxis.label, *axes.texts, *ticks] if text.get_text()]
    texts += figure.legends[0].get_texts()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    assert len(boxes) > 4 * len(names) + 5
    for (one, box), (other, another) in combinations(boxes, 2):
        assert not box.overlaps(another), f"{one!r} overlaps {other!r}"
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text!r} leaves the figure"
    for axes in figure.axes:
        for text in axes.texts:
            box = text.get_window_extent(renderer)
            assert axes.bbox.x0 <= box.x0, f"{text.get_text()!r} leaves its panel"
            assert box.x1 <= axes.bbox.x1, f"{text.get_text()!r} leaves its panel"


def test_the_plot_has_the_figures_of_the_table_best_on_top() -> None:
    comparison = comparison_of(NAMES, spread=0.05, best="median of retrieval:4")
    figure = draw_comparison(comparison)
    errors, differences, times, tokens = figure.axes
    strategies = [entry for entry in comparison.results if not entry.is_baseline]
    assert [label.get_text() for label in errors.get_yticklabels()] == [entry.name for entry in strategies]
    assert errors.get_ylim()[0] > errors.get_ylim()[1], "the first row is the top one"
    assert [text.get_text() for text in errors.texts] == [f"{entry.scores.mae:.1f}" for entry in strategies]
    table = {row[0]: row for row in comparison.rows()}
    column = comparison.headings().index("MAE $ to the best (95 %)")
    assert [text.get_text() for text in differences.texts] == [table[entry.name][column] for entry in strategies]
    assert differences.get_xlabel() == "the best: median of retrieval:4"
    assert [text.get_text() for text in times.texts] == [table[entry.name][-3] for entry in strategies]
    read_written = [f"{table[entry.name][-2]} + {table[entry.name][-1]}" for entry in strategies]
    assert [text.get_text() for text in tokens.texts] == read_written
    lines = {str(line.get_label()): line for line in errors.lines if not str(line.get_label()).startswith("_")}
    baselines = [entry for entry in comparison.results if entry.is_baseline]
    assert set(lines) == {f"{entry.name}: {entry.scores.mae:.1f}" for entry in baselines}
    for entry in baselines:
        drawn_at = lines[f"{entry.name}: {entry.scores.mae:.1f}"].get_xdata()
        assert set(drawn_at) == {float(entry.scores.mae)}  # type: ignore[arg-type]
    assert len({line.get_linestyle() for line in lines.values()}) == len(lines), "two baselines share a line style"


def test_the_metric_of_the_ranking_is_drawn() -> None:
    figure = draw_comparison(comparison_of(NAMES, spread=0.05, best="tools", criterion="rmsle"))
    assert figure.axes[0].get_title() == "RMSLE"
    assert figure.axes[1].get_title().startswith("RMSLE minus")


def test_everything_is_gray(tmp_path: Path) -> None:
    comparison = comparison_of(["a strategy with $5 and $6", *NAMES], spread=0.02, best="tools")
    path = plot_comparison(comparison, tmp_path / "p.png")
    colors = imread(path)[..., :3]
    assert colors.min() < 0.2 < 0.9 < colors.max()
    assert np.ptp(colors, axis=-1).max() == 0


def test_baselines_without_a_strategy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        plot_comparison(comparison_of([], spread=0.1, best=BASELINES[0]), tmp_path / "p.png")
