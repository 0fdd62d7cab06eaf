"""The report: one HTML page on how well a model estimates prices, that loads nothing and runs nothing.

Texts of items and names of models may be hostile: they reach the page only through jinja2's autoescaping, never through
a chart, and the page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastprice import __version__
from fastprice.common.files import atomic_file
from fastprice.errors import DataError
from fastprice.evaluation.charts import HUES, draw_error_by_band, draw_scatter, draw_training_curves
from fastprice.evaluation.formats import count_of, dollars, signed_dollars
from fastprice.evaluation.metrics import paired_difference

if TYPE_CHECKING:
    from fastprice.evaluation.evaluate import Evaluation, ModelResult

__all__ = ["write_report"]

_LARGEST_ERRORS = 10
_TEXT_CHARACTERS = 240  # of an item


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
    """Writes the report to `path`, complete or not at all, and returns that path.

    Args:
        path: of the HTML file; its folder is made where it does not exist.
        title: of the page.
        evaluation: of at least one model, on items that were not trained on.
        curves: logged moments of training: "step" and any of "loss", "eval_mae" (dollars), "tokens_per_second"; values
            that are None or not finite are left out.
        settings: name -> value; mappings inside it are written as "outer.inner".
        counts: what -> number of items (read, rejected by reason, train, validation, test), in the order given.
        notes: lines for the reader.
        focus: the model with the large scatter and the list of errors, by name; None: the last one.

    Raises DataError for an evaluation without models, an unknown `focus`, or a path that cannot be written.
    """
    path = Path(path)
    names = [result.name for result in evaluation.results]
    if not names:
        raise DataError("there is nothing to report: no model was evaluated")
    if focus is not None and focus not in names:
        raise DataError(f"no model is called {focus!r}: the evaluation has {', '.join(names)}")
    tuned = evaluation.result(focus or names[-1])
    others = [result for result in evaluation.results if result is not tuned]

    page = (
        _environment()
        .get_template("report.html")
        .render(
            title=title,
            version=__version__,
            evaluation=evaluation,
            tuned=tuned,
            summary=_summary(evaluation, tuned),
            comparison=_comparison(evaluation, tuned, others),
            scatter=draw_scatter(evaluation.truths, tuned),
            small_scatters=[(result, draw_scatter(evaluation.truths, result, small=True)) for result in others],
            legend=[(result.name, number % HUES) for number, result in enumerate([tuned, *others])],
            bands=draw_error_by_band(evaluation.truths, [tuned, *others]),
            curves=draw_training_curves(curves),
            largest_errors=list(_largest_errors(evaluation, tuned)),
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
    environment.filters["dollars"] = dollars
    return environment


def _write_whole(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as half:
            # "replace": an item's text may have a lone surrogate, which has no UTF-8.
            half.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(f"{path}: cannot write the report: {error.strerror}; name another place for it") from error


def _summary(evaluation: Evaluation, tuned: ModelResult) -> str:
    mae, hits = tuned.scores.mae, tuned.scores.hit_rate
    return (
        f"Measured on {count_of(len(evaluation.items), 'item')} held out from training. "
        f"The estimates of “{tuned.name}” are {dollars(mae)} off on average "
        f"({100 * evaluation.confidence:.0f}\u00a0% interval {dollars(mae.low)} to {dollars(mae.high)}), "
        f"and {hits:.1f}\u00a0% of them lie within $40 or 20\u00a0% of the price."
    )


def _comparison(evaluation: Evaluation, tuned: ModelResult, others: Sequence[ModelResult]) -> str:
    """The tuned model against the best of the others on the same items, whichever is better."""
    if not others:
        return ""
    rival = min(others, key=lambda result: float(result.scores.mae))
    gap = paired_difference(evaluation.truths, tuned.guesses, rival.guesses, confidence=evaluation.confidence)
    if gap.low <= 0 <= gap.high:
        return (
            f"These items are too few to distinguish its mean error from that of “{rival.name}”, the best of the "
            f"others (the difference is {signed_dollars(gap)}, interval {signed_dollars(gap.low)} to "
            f"{signed_dollars(gap.high)})."
        )
    near, far = sorted([abs(gap.low), abs(gap.high)])
    return (
        f"On the same items its mean error is {dollars(abs(gap))} ({dollars(near)} to {dollars(far)}) "
        f"{'below' if gap < 0 else 'above'} that of “{rival.name}”, the best of the others."
    )


def _largest_errors(evaluation: Evaluation, tuned: ModelResult) -> Iterator[dict[str, Any]]:
    error_N = tuned.guesses - evaluation.truths
    for index in np.argsort(-np.abs(error_N), kind="stable")[:_LARGEST_ERRORS]:
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
    return line if len(line) <= _TEXT_CHARACTERS else f"{line[:_TEXT_CHARACTERS].rstrip()} …"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "–" if value is None else str(value)
