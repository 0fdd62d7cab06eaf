"""One HTML file that says how well a model estimates prices: it loads nothing, runs nothing, and opens from a disk.

Charts are drawn by matplotlib as SVG and put into the page as elements. Their colors are CSS variables, so that the
page's light and dark schemes reach into them, and their text is text. matplotlib's own scatter costs about 100 bytes a
dot; here all dots of a chart are one path of zero-length strokes with round ends, about 15 bytes a dot.

Texts of items and names of models are hostile until escaped: they reach the page through jinja2's autoescaping alone,
never through a chart, and the page's content security policy forbids scripts and requests altogether.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fastprice import __version__
from fastprice.common.files import atomic_file
from fastprice.errors import DataError
from fastprice.evaluation.metrics import HIT_DOLLARS, HIT_SHARE, paired_difference

if TYPE_CHECKING:
    from fastprice.common.arrays import FloatArray
    from fastprice.evaluation.compare import Evaluation, ModelResult

__all__ = ["write_report"]

_WORST = 10
_TEXT_SHOWN = 240  # characters of an item
_DOTS = 2_000  # drawn at most in each scatter
_BAND_SHARE = 0.05  # of all items, that a price band holds at least
_HUES = 6  # as many as the template has --hue-0 ... --hue-5

# Stand-ins that `_svg` turns into CSS variables; black would not do, matplotlib leaves it out as SVG's default.
_INK, _FAINT, _BAND = "#010101", "#010102", "#010103"
_HUE = [f"#0200{number:02x}" for number in range(_HUES)]
_VARIABLES = {_INK: "ink", _FAINT: "faint", _BAND: "band", **{hue: f"hue-{n}" for n, hue in enumerate(_HUE)}}


@dataclass(frozen=True)
class _Chart:
    svg: Markup
    caption: str


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    evaluation: Evaluation,
    curves: Sequence[Mapping[str, float | None]],
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    notes: Sequence[str] = (),
    focus: str | None = None,
) -> Path:
    """Writes the report to `path`, whole or not at all, and returns that path.

    evaluation  what was measured on items held out from training; at least one model
    curves      logged moments of training: "step" and any of "loss", "eval_mae" (dollars), "tokens_per_second"; what
                is None or not finite is left out
    settings    name -> value; mappings inside it are shown as "outer.inner"
    counts      what -> number of items (read, rejected by reason, train, validation, test), in the order given
    notes       lines for the reader
    focus       the model looked at closely (scatter, worst items), by name; the last one unless it is given

    Raises DataError for an evaluation without models, an unknown `focus`, or a path that cannot be written.
    """
    path = Path(path)
    names = [result.name for result in evaluation.results]
    if not names:
        raise DataError("there is nothing to report: no model was evaluated")
    if focus is not None and focus not in names:
        raise DataError(f"no model is called {focus!r}: the evaluation has {', '.join(names)}")
    tuned = evaluation.result(focus or names[-1])
    ordered = [tuned, *(result for result in evaluation.results if result is not tuned)]

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastprice", "text.parse_math": False}):
        page = (
            _environment()
            .get_template("report.html")
            .render(
                title=title,
                version=__version__,
                evaluation=evaluation,
                tuned=tuned,
                summary=_summary(evaluation, tuned),
                comparison=_comparison(evaluation, tuned, ordered[1:]),
                scatter=_scatter(evaluation.truths, tuned),
                small_scatters=[(result, _scatter(evaluation.truths, result, small=True)) for result in ordered[1:]],
                legend=[(result.name, number % _HUES) for number, result in enumerate(ordered)],
                bands=_error_by_band(evaluation.truths, ordered),
                curves=_curves(curves),
                worst=list(_worst(evaluation, tuned)),
                settings=list(_flat(settings)),
                counts=counts,
                notes=list(notes),
            )
        )
    _write_whole(path, page)
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["dollars"] = _dollars
    return environment


def _write_whole(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as half:
            # "replace": an item's text may hold a lone surrogate, which is no character and has no UTF-8.
            half.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(f"{path}: cannot write the report: {error.strerror}; name another place for it") from error


# ---- What the numbers say, in words ---------------------------------------------------------------------------------


def _summary(evaluation: Evaluation, tuned: ModelResult) -> str:
    mae, hits = tuned.scores.mae, tuned.scores.hit_rate
    return (
        f"Measured on {_count(len(evaluation.items), 'item')} held out from training. The estimates of “{tuned.name}” "
        f"are {_dollars(mae)} off on average ({100 * evaluation.confidence:.0f}\u00a0% interval {_dollars(mae.low)} to "
        f"{_dollars(mae.high)}), and {hits:.1f}\u00a0% of them lie within $40 or 20\u00a0% of the price."
    )


def _comparison(evaluation: Evaluation, tuned: ModelResult, others: Sequence[ModelResult]) -> str:
    """The tuned model against the best of the others, on the same items, for better or worse."""
    if not others:
        return ""
    rival = min(others, key=lambda result: float(result.scores.mae))
    gap = paired_difference(evaluation.truths, tuned.guesses, rival.guesses, confidence=evaluation.confidence)
    if gap.low <= 0 <= gap.high:
        return (
            f"These items are too few to tell its mean error from that of “{rival.name}”, the best of the others (the "
            f"difference is {_signed(gap)}, interval {_signed(gap.low)} to {_signed(gap.high)})."
        )
    near, far = sorted([abs(gap.low), abs(gap.high)])
    return (
        f"On the same items its mean error is {_dollars(abs(gap))} ({_dollars(near)} to {_dollars(far)}) "
        f"{'below' if gap < 0 else 'above'} that of “{rival.name}”, the best of the others."
    )


def _worst(evaluation: Evaluation, tuned: ModelResult) -> Iterator[dict[str, Any]]:
    error_N = tuned.guesses - evaluation.truths
    for index in np.argsort(-np.abs(error_N), kind="stable")[:_WORST]:
        item = evaluation.items[index]
        yield {
            "text": _shortened(item.text),
            "row": item.row,
            "truth": float(evaluation.truths[index]),
            "guess": float(tuned.guesses[index]),
            "error": float(error_N[index]),
        }


def _shortened(text: str) -> str:
    line = " · ".join(part for part in (" ".join(line.split()) for line in text.splitlines()) if part)
    return line if len(line) <= _TEXT_SHOWN else f"{line[:_TEXT_SHOWN].rstrip()} …"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "–" if value is None else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _dollars(value: float) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}${abs(value):,.2f}" if abs(value) < 1e9 else f"{sign}${abs(value):.3g}"


def _signed(value: float) -> str:
    return _dollars(value) if value < 0 else f"+{_dollars(value)}"


def _tick(value: float, position: int | None = None) -> str:
    if value >= 1e9:
        return f"${value:.3g}"
    if value == round(value):
        return f"${value:,.0f}"
    return f"${value:,.2f}" if value >= 0.01 else f"${value:g}"


# ---- Charts ---------------------------------------------------------------------------------------------------------


def _scatter(truths_N: FloatArray, result: ModelResult, small: bool = False) -> _Chart:
    """Estimate against truth on log axes, the hit band shaded; the axes span the truths, twice over either end."""
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
    _dots(axes, points, _HUE[0] if not small else _INK, 2.0 if small else 3.4)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axis.set_major_formatter(FuncFormatter(_tick))
        axis.set_minor_locator(NullLocator())
    if not small:
        axes.set(xlabel="true price", ylabel="estimate")

    caption = f"{len(drawn):,} of {len(truths_N):,} items, chosen at random. " if len(drawn) < len(truths_N) else ""
    if outside:
        caption += f"On the edge: {_count(outside, 'estimate')} beyond the axes."
    alternative = (
        f"Scatter of estimate against true price, both on logarithmic axes, for {result.name}: "
        f"{result.scores.hit_rate:.1f} % of {len(truths_N):,} items lie in the shaded band of hits."
    )
    return _Chart(_svg(drawing, alternative), caption.strip())


@dataclass(frozen=True)
class _Bands:
    svg: Markup
    rows: list[tuple[str, int, list[float]]]  # label, number of items, mean absolute error of each model


def _error_by_band(truths_N: FloatArray, results: Sequence[ModelResult]) -> _Bands:
    """Mean absolute error of each model within each price band."""
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
        axes.barh(height, [row[2][number] for row in rows], thickness * 0.9, color=_HUE[number % _HUES])
    axes.set_yticks(range(len(rows)), [f"{label}\n{_count(count, 'item')}" for label, count, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=_FAINT, lw=0.5, alpha=0.5)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="mean absolute error")
    described = "; ".join(f"{label}: {_dollars(errors[0])} over {count:,}" for label, count, errors in rows)
    return _Bands(_svg(drawing, f"Mean absolute error by true price. {results[0].name}: {described}."), rows)


def _band_edges(truths_N: FloatArray) -> list[float]:
    """Round prices (1, 2.5, 5, 10, ...) between bands that each hold at least a twentieth of the items, ascending."""
    enough = max(1.0, len(truths_N) * _BAND_SHARE)
    edges: list[float] = []
    start = math.floor(math.log10(truths_N.min()))
    for power in range(start, math.ceil(math.log10(truths_N.max())) + 1):
        for digit in (1.0, 2.5, 5.0):
            edge = float(f"{digit}e{power}")  # 10.0**-1 * 2.5 would not be 0.25
            since = truths_N >= edges[-1] if edges else np.full(len(truths_N), True)
            if (since & (truths_N < edge)).sum() >= enough and (truths_N >= edge).sum() >= enough:
                edges.append(edge)
    return edges


def _band_label(edges: Sequence[float], band: int) -> str:
    if not edges:
        return "all"
    if band == 0:
        return f"< {_tick(edges[0])}"
    if band == len(edges):
        return f"≥ {_tick(edges[-1])}"
    return f"{_tick(edges[band - 1])}–{_tick(edges[band])[1:]}"


def _curves(curves: Sequence[Mapping[str, float | None]]) -> _Chart | None:
    """Training loss above, validation error in dollars below, over steps; None where neither was logged."""
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
        show = _dollars if in_dollars else "{:.3f}".format
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
    return _Chart(_svg(drawing, f"Curves of training: {sentence}."), f"{sentence[:1].upper()}{sentence[1:]}. {caption}")


def _logged(curves: Sequence[Mapping[str, float | None]], key: str) -> FloatArray:
    """(step, value) of the moments where `key` was logged as a finite number: (P, 2), steps ascending."""
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


def _dots(axes: Axes, points_P2: FloatArray, color: str, size: float) -> None:
    """All points as one path of zero-length strokes with round ends, `size` points across."""
    codes = np.tile([Outline.MOVETO, Outline.LINETO], len(points_P2)).astype(np.uint8)
    outline = Outline(np.repeat(points_P2, 2, axis=0), codes)
    outline.should_simplify = False  # it would drop strokes without length
    axes.add_patch(PathPatch(outline, fill=False, ec=color, lw=size, alpha=0.55, capstyle="round", clip_on=False))


def _svg(drawing: Drawing, alternative: str) -> Markup:
    """The drawing as an <svg> element that scales with its place, follows the page's colors and has a text for it."""
    buffer = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    drawing.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    # Names that nothing refers to would be there once for every chart of the page.
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    # A tenth of a point is as fine as any screen shows.
    svg = re.sub(r' d="([^"]*)"', lambda path: f' d="{_rounded(path[1])}"', svg)
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(
        svg.split('viewBox="')[1].split('"')[0], alternative
    )
    return head + Markup(svg[svg.index(">") + 1 :])


def _rounded(path: str) -> str:
    numbers = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), path)
    return re.sub(r"M (\S+) (\S+) \nL \1 \2 \n?", r"M\1 \2h0", numbers).replace(" \n", "")
