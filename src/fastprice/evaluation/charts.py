"""Charts of the report: estimates against true prices, error by price, training curves; as SVG elements for its page.

matplotlib draws them. Their colors are CSS variables, so that the page's light and dark schemes and printing apply to
them, and their text is text. matplotlib's own scatter takes about 100 bytes a dot; here all dots of a chart are one
path of zero-length strokes with round ends, about 15 bytes a dot.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fastprice.common.arrays import FloatArray
from fastprice.evaluation.formats import count_of, dollars, price_tick
from fastprice.inference.price_distribution import HIT_DOLLARS, HIT_SHARE

if TYPE_CHECKING:
    from fastprice.evaluation.evaluate import ModelResult

__all__ = ["HUES", "BandChart", "Chart", "draw_error_by_band", "draw_scatter", "draw_training_curves"]

HUES = 6  # colors of models, as many as the page has --hue-0 ... --hue-5

_DOTS = 2_000  # drawn at most in each scatter
_BAND_SHARE = 0.05  # of all items, that a price band has at least

# Colors that `_svg` replaces by CSS variables; black would not do, since matplotlib omits it as SVG's default.
_INK, _FAINT, _BAND = "#010101", "#010102", "#010103"
_HUE = [f"#0200{number:02x}" for number in range(HUES)]
_VARIABLES = {_INK: "ink", _FAINT: "faint", _BAND: "band", **{hue: f"hue-{n}" for n, hue in enumerate(_HUE)}}
# Text as text, equal names of parts in equal charts, and "$" as a dollar sign.
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "fastprice", "text.parse_math": False}

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Chart:
    """An <svg> element that scales with its place, and a caption for it, which may be empty."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class BandChart:
    """An <svg> element, and its numbers: label, number of items and mean absolute error of each model, by band."""

    svg: Markup
    rows: list[tuple[str, int, list[float]]]


def _with_settings(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """`draw` under `_SETTINGS`, which matplotlib reads while it draws."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with matplotlib.rc_context(_SETTINGS):
            return draw(*args, **kwargs)

    return drawn


@_with_settings
def draw_scatter(truths_N: FloatArray, result: ModelResult, small: bool = False) -> Chart:
    """Estimates against true prices (N dollars) on log axes, with the band of hits shaded.

    The axes go from half of the lowest true price to twice the highest; estimates beyond them are drawn on the edge.
    """
    low, high = float(truths_N.min()) / 2, float(truths_N.max()) * 2
    guesses_N = np.clip(result.guesses, low, high)
    outside = int((guesses_N != result.guesses).sum())
    drawn = np.arange(len(truths_N))
    if len(drawn) > _DOTS:
        drawn = np.sort(np.random.default_rng(0).choice(drawn, _DOTS, replace=False))

    drawing, (axes,) = _axes(2.6 if small else 5.2, 2.6 if small else 5.0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    truth_G = np.geomspace(low, high, 200)
    reach_G = np.maximum(HIT_DOLLARS, truth_G / HIT_SHARE)
    axes.fill_between(
        truth_G, np.maximum(truth_G - reach_G, low), np.minimum(truth_G + reach_G, high), color=_BAND, lw=0
    )
    axes.plot([low, high], [low, high], color=_INK, lw=0.8, zorder=3)
    points = np.column_stack([truths_N[drawn], guesses_N[drawn]])
    _draw_dots(axes, points, _HUE[0] if not small else _INK, 2.0 if small else 3.4)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axis.set_major_formatter(FuncFormatter(price_tick))
        axis.set_minor_locator(NullLocator())
    if not small:
        axes.set(xlabel="true price", ylabel="estimate")

    caption = f"{len(drawn):,} of {len(truths_N):,} items, chosen at random. " if len(drawn) < len(truths_N) else ""
    if outside:
        caption += f"On the edge: {count_of(outside, 'estimate')} beyond the axes."
    alternative = (
        f"Scatter of estimate against true price, both on logarithmic axes, for {result.name}: "
        f"{result.scores.hit_rate:.1f} % of {len(truths_N):,} items lie in the shaded band of hits."
    )
    return Chart(_svg(drawing, alternative), caption.strip())


@_with_settings
def draw_error_by_band(truths_N: FloatArray, results: Sequence[ModelResult]) -> BandChart:
    """Mean absolute error of each model within each band of true prices (N dollars)."""
    edges = _band_edges(truths_N)
    band_N = np.searchsorted(edges, truths_N, side="right")
    rows = []
    for band in range(len(edges) + 1):
        inside = band_N == band
        errors = [float(np.abs(result.guesses - truths_N)[inside].mean()) for result in results]
        rows.append((_band_label(edges, band), int(inside.sum()), errors))

    thickness = 0.8 / len(results)
    drawing, (axes,) = _axes(5.6, 0.7 + len(rows) * (0.25 + 0.09 * len(results)))
    for number in range(len(results)):
        height = [band - 0.4 + (number + 0.5) * thickness for band in range(len(rows))]
        axes.barh(height, [row[2][number] for row in rows], thickness * 0.9, color=_HUE[number % HUES])
    axes.set_yticks(range(len(rows)), [f"{label}\n{count_of(count, 'item')}" for label, count, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(price_tick))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=_FAINT, lw=0.5, alpha=0.5)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="mean absolute error")
    described = "; ".join(f"{label}: {dollars(errors[0])} over {count:,}" for label, count, errors in rows)
    return BandChart(_svg(drawing, f"Mean absolute error by true price. {results[0].name}: {described}."), rows)


def _band_edges(truths_N: FloatArray) -> list[float]:
    """Ascending round prices (1, 2.5, 5, 10, ...) between bands with at least `_BAND_SHARE` of the items each."""
    least = max(1.0, len(truths_N) * _BAND_SHARE)
    edges: list[float] = []
    start = math.floor(math.log10(truths_N.min()))
    for power in range(start, math.ceil(math.log10(truths_N.max())) + 1):
        for digit in (1.0, 2.5, 5.0):
            edge = float(f"{digit}e{power}")  # 10.0**-1 * 2.5 would not be 0.25
            since = truths_N >= edges[-1] if edges else np.full(len(truths_N), True)
            if (since & (truths_N < edge)).sum() >= least and (truths_N >= edge).sum() >= least:
                edges.append(edge)
    return edges


def _band_label(edges: Sequence[float], band: int) -> str:
    if not edges:
        return "all"
    if band == 0:
        return f"< {price_tick(edges[0])}"
    if band == len(edges):
        return f"≥ {price_tick(edges[-1])}"
    return f"{price_tick(edges[band - 1])}–{price_tick(edges[band])[1:]}"


@_with_settings
def draw_training_curves(curves: Sequence[Mapping[str, float | None]]) -> Chart | None:
    """Training loss above, validation error in dollars below, over steps; None where neither was logged.

    curves  logged moments with "step" and any of "loss", "eval_mae" and "tokens_per_second", see `write_report`
    """
    labels = {"loss": "training loss (nats a token)", "eval_mae": "validation error (mean absolute)"}
    series = {key: found for key in labels if len(found := _logged(curves, key))}
    if not series:
        return None
    drawing, axes = _axes(5.6, 1.9 * len(series) + 0.3, rows=len(series))
    described = []
    for axis, (key, points) in zip(axes, series.items(), strict=True):
        in_dollars = key == "eval_mae"
        axis.plot(*points.T, color=_HUE[0], lw=1.4, marker="o" if in_dollars or len(points) < 3 else "", ms=3.5)
        axis.set_title(labels[key], loc="left", fontsize=11, color=_INK)
        axis.grid(axis="y", color=_FAINT, lw=0.5, alpha=0.5)
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        show = dollars if in_dollars else "{:.3f}".format
        if in_dollars:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"${value:,.6g}"))
            step, best = points[np.argmin(points[:, 1])]
            described.append(f"{labels[key]} lowest at step {step:.0f} with {show(best)}")
        else:
            described.append(f"{labels[key]} from {show(points[0, 1])} to {show(points[-1, 1])}")
    axes[-1].set_xlabel("step")
    speed = _logged(curves, "tokens_per_second")
    caption = f"Median speed: {np.median(speed[:, 1]):,.0f} tokens a second." if len(speed) else ""
    sentence = "; ".join(described)
    return Chart(_svg(drawing, f"Curves of training: {sentence}."), f"{sentence[:1].upper()}{sentence[1:]}. {caption}")


def _logged(curves: Sequence[Mapping[str, float | None]], key: str) -> FloatArray:
    """(step, value) of the P moments where `key` was logged as a finite number: (P, 2), steps ascending."""
    found = [
        (float(step), float(value))
        for moment in curves
        if (value := moment.get(key)) is not None and math.isfinite(value) and (step := moment.get("step")) is not None
    ]
    return np.array(sorted(found), dtype=np.float64).reshape(-1, 2)


def _axes(width: float, height: float, rows: int = 1) -> tuple[Drawing, list[Axes]]:
    """A transparent drawing of `width` by `height` inches and its Axes, `rows` of them above one another."""
    drawing = Drawing(figsize=(width, height), layout="constrained")
    drawing.patch.set_visible(False)
    axes = list(drawing.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for axis in axes:
        axis.patch.set_visible(False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set(color=_FAINT, linewidth=0.8)
        axis.tick_params(color=_FAINT, labelcolor=_INK, labelsize=11)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set(color=_INK, fontsize=11)
        axis.set_axisbelow(True)
    return drawing, axes


def _draw_dots(axes: Axes, points_P2: FloatArray, color: str, size: float) -> None:
    """All points as one path of zero-length strokes with round ends, `size` points across."""
    codes = np.tile([Outline.MOVETO, Outline.LINETO], len(points_P2)).astype(np.uint8)
    outline = Outline(np.repeat(points_P2, 2, axis=0), codes)
    outline.should_simplify = False  # it would drop strokes without length
    axes.add_patch(PathPatch(outline, fill=False, ec=color, lw=size, alpha=0.55, capstyle="round", clip_on=False))


def _svg(drawing: Drawing, alternative: str) -> Markup:
    """The drawing as an <svg> element that scales with its place, in the page's colors, with a text alternative."""
    buffer = io.StringIO()
    no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    drawing.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    # Names that nothing refers to would occur once in every chart of the page.
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    # No screen shows less than a tenth of a point.
    svg = re.sub(r' d="([^"]*)"', lambda path: f' d="{_rounded(path[1])}"', svg)
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(
        svg.split('viewBox="')[1].split('"')[0], alternative
    )
    return head + Markup(svg[svg.index(">") + 1 :])


def _rounded(path: str) -> str:
    rounded = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), path)
    return re.sub(r"M (\S+) (\S+) \nL \1 \2 \n?", r"M\1 \2h0", rounded).replace(" \n", "")
