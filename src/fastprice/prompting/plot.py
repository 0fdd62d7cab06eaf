"""Plot of a comparison of strategies: error, difference to the best, time and tokens.

A row for each strategy, the best on top; baselines are lines across the rows. Everything is distinguished by shades of
gray, dashes and hatching, so that a black and white print is readable.
"""

from __future__ import annotations

import os
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from fastprice.common.plots import check_plot, save_plot
from fastprice.errors import DataError
from fastprice.prompting.compare import HEADINGS, format_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastprice.evaluation import metrics
    from fastprice.prompting.compare import StrategyComparison, StrategyResult

__all__ = ["draw_comparison", "plot_comparison"]

_ROW_INCHES = 0.42
_INK, _GRAY, _LIGHT = "#1a1a1a", "#767676", "#c4c4c4"
_DASHES = ("--", ":", "-.", (0, (8, 2)), (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))


def plot_comparison(comparison: StrategyComparison, path: str | os.PathLike[str]) -> Path:
    """Draws the strategies by rank, writes the figure to `path` (PNG, SVG or PDF by its ending) and returns the path.

    Raises ConfigError for another ending or a folder that does not exist, MissingDependencyError without matplotlib,
    DataError where no strategy was compared.
    """
    target = check_plot(path)
    save_plot(draw_comparison(comparison), target)
    return target


def draw_comparison(comparison: StrategyComparison) -> Figure:
    """Four panels that share their rows: error, difference to the best, time and tokens an item.

    Raises DataError where no strategy was compared.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    strategies = [result for result in comparison.results if not result.is_baseline]
    if not strategies:
        raise DataError("no strategy was compared, so there is nothing to draw; name one or more")
    rows = range(len(strategies))
    # A "$" would begin a formula.
    with rc_context({"text.parse_math": False, "font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(11, 1.9 + _ROW_INCHES * len(strategies)), layout="constrained")
        errors, differences, times, tokens = figure.subplots(1, 4, sharey=True, width_ratios=[4, 3.6, 2, 2.8])
        _draw_errors(errors, comparison, strategies)
        _draw_differences(differences, comparison, strategies)
        times.set_title("time (ms an item)")
        _draw_bars(
            times, [result.ms_per_item for result in strategies], [f"{result.ms_per_item:.1f}" for result in strategies]
        )
        _draw_tokens(tokens, strategies)
        errors.set_yticks(rows, [result.name for result in strategies])
        errors.set_ylim(len(strategies) - 0.4, -0.6)
        for axes in (errors, differences, times, tokens):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figure.suptitle(
            f"{len(comparison.truths):,} unseen items, the best strategy on top; lines across a dot: 95 % intervals",
            fontsize=10,
        )
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_errors(axes: Axes, comparison: StrategyComparison, strategies: list[StrategyResult]) -> None:
    def figure_of(result: StrategyResult) -> metrics.Figure:
        figure: metrics.Figure = getattr(result.scores, comparison.metric)
        return figure

    axes.set_title(HEADINGS[comparison.metric])
    digits = _digits(comparison.metric)
    for result, dashes in zip(
        (result for result in comparison.results if result.is_baseline), cycle(_DASHES), strict=False
    ):
        label = f"{result.name}: {figure_of(result):.{digits}f}"
        axes.axvline(float(figure_of(result)), color=_GRAY, linestyle=dashes, linewidth=1.4, label=label, zorder=1)
    figures = [figure_of(result) for result in strategies]
    _draw_intervals(axes, figures, [f"{each:.{digits}f}" for each in figures], wide=False)


def _draw_differences(axes: Axes, comparison: StrategyComparison, strategies: list[StrategyResult]) -> None:
    best = comparison.results[0]
    axes.set_title(f"{HEADINGS[comparison.metric]} minus that of the best, item by item")
    axes.set_xlabel(f"the best: {best.name}")
    axes.axvline(0, color=_GRAY, linewidth=0.8, zorder=1)
    figures = [comparison.difference(result, best) for result in strategies]
    labels = ["best" if result is best else format_difference(each, comparison.metric)
              for result, each in zip(strategies, figures, strict=True)]  # fmt: skip
    _draw_intervals(axes, figures, labels, wide=True)


def _draw_intervals(axes: Axes, figures: list[metrics.Figure], labels: list[str], *, wide: bool) -> None:
    """A dot on a line from `low` to `high` for each row, its label above; `wide`: of up to half the panel's width."""
    rows = range(len(figures))
    axes.hlines(rows, [each.low for each in figures], [each.high for each in figures], color=_INK, linewidth=1.6)
    axes.plot([float(each) for each in figures], rows, "o", color=_INK, markersize=5)
    axes.margins(x=0.08)
    left, right = axes.get_xlim()
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for row, figure, label in zip(rows, figures, labels, strict=True):
        place = (figure - left) / (right - left)
        side, x = "center", float(figure)
        if wide and place < 0.3:  # it would reach across the border
            side, x = "left", figure.low
        elif wide and place > 0.7:
            side, x = "right", figure.high
        axes.annotate(
            label, (x, row), (0, 5), textcoords="offset points", ha=side, va="bottom", fontsize=7, bbox=ground
        )  # fmt: skip


def _draw_bars(axes: Axes, lengths: list[float], labels: list[str]) -> None:
    """A bar for each row with its label at its end."""
    bars = axes.barh(range(len(lengths)), lengths, 0.55, color=_LIGHT, edgecolor=_INK, linewidth=0.6)
    axes.bar_label(bars, labels, padding=3, fontsize=7)
    axes.set_xlim(0, 1.3 * (max(lengths) or 1))


def _draw_tokens(axes: Axes, strategies: list[StrategyResult]) -> None:
    axes.set_title("tokens an item (read + written)")
    read = [result.prompt_tokens for result in strategies]
    written = [result.generated_tokens for result in strategies]
    rows = range(len(strategies))
    axes.barh(rows, read, 0.55, color=_LIGHT, edgecolor=_INK, linewidth=0.6, label="tokens read")
    ends = axes.barh(
        rows, written, 0.55, left=read, color="white", edgecolor=_INK, linewidth=0.6, hatch="/////",
        label="tokens written",
    )  # fmt: skip
    labels = [f"{result.prompt_tokens:.0f} + {result.generated_tokens:.1f}" for result in strategies]
    axes.bar_label(ends, labels, padding=3, fontsize=7)
    longest = max(a + b for a, b in zip(read, written, strict=True))
    axes.set_xlim(0, 1.45 * (longest or 1))


def _digits(metric: str) -> int:
    return 3 if metric == "rmsle" else 1
