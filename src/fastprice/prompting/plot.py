"""A picture of a comparison: what a strategy errs, against the best, and what it costs in time and tokens.

A row for each strategy, the best on top; baselines ask no model and are lines across the rows. Shades of grey, dashes
and hatching tell things apart, so that a black and white print says as much.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from fastprice.errors import DataError
from fastprice.prompting.compare import HEADINGS, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastprice.evaluation import metrics
    from fastprice.prompting.compare import Comparison, Entry

__all__ = ["draw_comparison"]

_ROW_INCHES = 0.42
_INK, _GREY, _LIGHT = "#1a1a1a", "#767676", "#c4c4c4"
_DASHES = ("--", ":", "-.", (0, (8, 2)), (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))


def draw_comparison(comparison: Comparison) -> Figure:
    """Four panels that share their rows: error, difference to the best, time and tokens an item.

    Raises DataError where no strategy was compared.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    asked = [entry for entry in comparison.entries if not entry.baseline]
    if not asked:
        raise DataError("no strategy was compared, so that there is nothing to draw")
    rows = range(len(asked))
    # A "$" would begin a formula.
    with rc_context({"text.parse_math": False, "font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(11, 1.9 + _ROW_INCHES * len(asked)), layout="constrained")
        errors, differences, times, tokens = figure.subplots(1, 4, sharey=True, width_ratios=[4, 3.6, 2, 2.8])
        _draw_errors(errors, comparison, asked)
        _draw_differences(differences, comparison, asked)
        times.set_title("time (ms an item)")
        _draw_bars(times, [entry.ms_per_item for entry in asked], [f"{entry.ms_per_item:.1f}" for entry in asked])
        _draw_tokens(tokens, asked)
        errors.set_yticks(rows, [entry.name for entry in asked])
        errors.set_ylim(len(asked) - 0.4, -0.6)
        for axes in (errors, differences, times, tokens):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figure.suptitle(
            f"{len(comparison.truths):,} unseen items, the best strategy on top; lines across a dot: 95 % intervals",
            fontsize=10,
        )
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_errors(axes: Axes, comparison: Comparison, asked: list[Entry]) -> None:
    def figure_of(entry: Entry) -> metrics.Figure:
        figure: metrics.Figure = getattr(entry.scores, comparison.metric)
        return figure

    axes.set_title(HEADINGS[comparison.metric])
    digits = _digits(comparison.metric)
    for entry, dashes in zip((entry for entry in comparison.entries if entry.baseline), cycle(_DASHES), strict=False):
        label = f"{entry.name}: {figure_of(entry):.{digits}f}"
        axes.axvline(float(figure_of(entry)), color=_GREY, linestyle=dashes, linewidth=1.4, label=label, zorder=1)
    figures = [figure_of(entry) for entry in asked]
    _draw_intervals(axes, figures, [f"{each:.{digits}f}" for each in figures], wide=False)


def _draw_differences(axes: Axes, comparison: Comparison, asked: list[Entry]) -> None:
    best = comparison.entries[0]
    axes.set_title(f"{HEADINGS[comparison.metric]} less that of the best, item by item")
    axes.set_xlabel(f"the best: {best.name}")
    axes.axvline(0, color=_GREY, linewidth=0.8, zorder=1)
    figures = [comparison.difference(entry, best) for entry in asked]
    labels = ["best" if entry is best else signed(each, comparison.metric)
              for entry, each in zip(asked, figures, strict=True)]  # fmt: skip
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


def _draw_tokens(axes: Axes, asked: list[Entry]) -> None:
    axes.set_title("tokens an item (read + written)")
    read = [entry.prompt_tokens for entry in asked]
    written = [entry.generated_tokens for entry in asked]
    rows = range(len(asked))
    axes.barh(rows, read, 0.55, color=_LIGHT, edgecolor=_INK, linewidth=0.6, label="tokens read")
    ends = axes.barh(
        rows, written, 0.55, left=read, color="white", edgecolor=_INK, linewidth=0.6, hatch="/////",
        label="tokens written",
    )  # fmt: skip
    labels = [f"{entry.prompt_tokens:.0f} + {entry.generated_tokens:.1f}" for entry in asked]
    axes.bar_label(ends, labels, padding=3, fontsize=7)
    longest = max(a + b for a, b in zip(read, written, strict=True))
    axes.set_xlim(0, 1.45 * (longest or 1))


def _digits(metric: str) -> int:
    return 3 if metric == "rmsle" else 1
