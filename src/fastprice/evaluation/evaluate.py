"""Evaluation of several models on the same unseen items: their estimates, their scores, and one table of them.

A model is a name and a function from N texts to N dollars. Nothing here depends on how a model works, so base model,
tuned model and baselines are measured by the same code on the same items, their time as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastprice.common.arrays import FloatArray
from fastprice.errors import DataError
from fastprice.evaluation.metrics import Figure, Scores, score

if TYPE_CHECKING:
    from rich.table import Table

    from fastprice.data.items import Item

__all__ = [
    "Evaluation",
    "ModelResult",
    "PredictFunction",
    "evaluate_model",
    "evaluate_models",
    "narrow_table",
    "true_prices",
]

PredictFunction = Callable[[list[str]], ArrayLike]

HIGHER_IS_BETTER = frozenset({"r2", "hit_rate"})
_HEADINGS = {"mae": "MAE $", "rmse": "RMSE $", "rmsle": "RMSLE", "mape": "MAPE %", "r2": "R²", "hit_rate": "hits %"}
_DECIMALS = {"mae": 2, "rmse": 2, "rmsle": 3, "mape": 1, "r2": 3, "hit_rate": 1}
_TIME_HEADING = "ms/item"
_ROWS_NAMED = 5


@dataclass(frozen=True, eq=False)
class ModelResult:
    """One model on the items of an `Evaluation`.

    Attributes:
        name: of the model, in tables and charts.
        guesses: its estimates, float64 (N,), dollars, in the order of the items.
        scores: their metrics.
        seconds: wall time of the one call that predicted all N, with warm-up.
        unparsed: number of items for which the model gave no price, so that `guesses` has the fallback.
        note: one line for the reader of the table.
    """

    name: str
    guesses: FloatArray
    scores: Scores
    seconds: float
    unparsed: int = 0
    note: str = ""

    @property
    def ms_per_item(self) -> float:
        """Wall time of prediction, milliseconds an item."""
        return 1000.0 * self.seconds / len(self.guesses)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Several models on the same items, as `fastprice.run.train_and_evaluate` and `evaluate_models` return it.

    Attributes:
        items: the N items, none of them trained on.
        truths: their true prices, float64 (N,), dollars.
        results: one result a model, in the order of the table.
        confidence: of every interval in `results`, 0 to 1.
    """

    items: list[Item]
    truths: FloatArray
    results: list[ModelResult]
    confidence: float = 0.95

    def result(self, name: str) -> ModelResult:
        """The result of the model called `name`; KeyError where there is none."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def cells(self, *, compact: bool = False) -> list[list[tuple[str, bool]]]:
        """The body of the table, one list a model: (text, whether it is the best of its column), as in `headings`.

        `compact`: with fewer decimals in long numbers and in the bounds of intervals, for a terminal.
        """
        best = {
            metric: _best(metric, [getattr(result.scores, metric) for result in self.results]) for metric in _HEADINGS
        }
        return [
            [
                (result.name, False),
                *(
                    (_cell(metric, figure := getattr(result.scores, metric), compact), float(figure) == best[metric])
                    for metric in _HEADINGS
                ),
                (_milliseconds(result.ms_per_item), False),
            ]
            for result in self.results
        ]

    @staticmethod
    def headings() -> list[str]:
        """The headings of the table's columns: the model, its metrics, its time."""
        return ["model", *_HEADINGS.values(), _TIME_HEADING]

    def footnotes(self) -> list[str]:
        """One line for each model that has a note or gave no price for some items."""
        lines = []
        for result in self.results:
            remarks = [result.note] if result.note else []
            if result.unparsed:
                count = f"{result.unparsed:,} of {len(self.items):,}"
                remarks.append(f"no price for {count} items, where the fallback is scored")
            if remarks:
                lines.append(f"{result.name}: {'; '.join(remarks)}")
        return lines

    def table(self, title: str | None = None) -> Table:
        """A rich table for a terminal of 80 columns and names of 18 characters; the best of each column is bold.

        `title` None: the number of items.
        """
        from rich.text import Text

        table = narrow_table(title or f"{len(self.items):,} items", self.footnotes())
        table.add_column(self.headings()[0], overflow="fold")
        for heading in self.headings()[1:]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.cells(compact=True):
            # Text, not str: a model's name may hold square brackets, which rich would read as markup.
            table.add_row(*(Text(text, style="bold" if is_best else "") for text, is_best in row))
        return table

    def markdown(self) -> str:
        """The same table in Markdown, footnotes under it; ends without a newline."""
        headings = self.headings()
        lines = [_markdown_row(headings), _markdown_row(["---", *["---:"] * (len(headings) - 1)])]
        for row in self.cells():
            lines.append(_markdown_row([f"**{text}**" if is_best else _escape(text) for text, is_best in row]))
        footnotes = self.footnotes()
        return "\n".join([*lines, *([""] if footnotes else []), *(f"- {line}" for line in footnotes)])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the number of items and each model's figures; neither texts nor estimates."""
        return {
            "items": len(self.items),
            "confidence": self.confidence,
            "models": [
                {
                    "name": result.name,
                    "scores": result.scores.as_dict(),
                    "seconds": result.seconds,
                    "ms_per_item": result.ms_per_item,
                    "unparsed": result.unparsed,
                    "note": result.note,
                }
                for result in self.results
            ],
        }


def evaluate_models(
    models: Mapping[str, PredictFunction],
    items: Sequence[Item],
    *,
    fallback: float | None = None,
    notes: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Evaluates every model of `models` (name -> function from texts to dollars) on `items`, in the mapping's order.

    Args:
        models: functions from a list of N texts to N dollars, by name.
        items: N items with true prices.
        fallback: dollars for items without an estimate (NaN); None: a NaN is an error.
        notes: a line for the reader, for some of the names.
        confidence: of the bootstrap intervals; `resamples` and `seed`: of the bootstrap, see `score`.

    Raises DataError, before any model runs, where an item has no true price; else as `evaluate_model`.
    """
    truths_N = true_prices(items)
    remarks = notes or {}
    results = [
        evaluate_model(
            name,
            predict,
            items,
            fallback=fallback,
            note=remarks.get(name, ""),
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
        for name, predict in models.items()
    ]
    return Evaluation(list(items), truths_N, results, confidence)


def evaluate_model(
    name: str,
    predict: PredictFunction,
    items: Sequence[Item],
    *,
    fallback: float | None = None,
    note: str = "",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> ModelResult:
    """Times one call of `predict` on the texts of `items`, and scores its estimates.

    A model without a price for an item returns NaN there: `fallback` (dollars) replaces it, and `unparsed` counts such
    items. Raises DataError for an item without a true price, for a NaN without a fallback, and for any other estimate
    that is not a finite number.
    """
    truths_N = true_prices(items)
    texts = [item.text for item in items]
    start = time.perf_counter()
    answer = predict(texts)
    seconds = time.perf_counter() - start

    unparsed = 0
    try:
        guesses_N = np.array(answer, dtype=np.float64)
        if fallback is not None:
            missing_N = np.isnan(guesses_N)
            unparsed = int(missing_N.sum())
            guesses_N[missing_N] = fallback
        scores = score(truths_N, guesses_N, confidence=confidence, resamples=resamples, seed=seed)
    except (DataError, TypeError, ValueError) as error:
        raise DataError(f"model {name!r}: {error}") from error
    return ModelResult(name, guesses_N, scores, seconds, unparsed, note)


def narrow_table(title: str, footnotes: Sequence[str]) -> Table:
    """A rich table without columns yet: no side borders, no edge padding, so that it fits a terminal of 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title,
        caption="\n".join(footnotes) or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )


def true_prices(items: Sequence[Item]) -> FloatArray:
    """The prices of N items in dollars, float64 (N,); DataError names the rows of those that have none."""
    if not items:
        raise DataError("there are no items to evaluate on: the test set is empty")
    without = [index for index, item in enumerate(items) if item.price is None]
    if without:
        named = ", ".join(_location(items[index], index) for index in without[:_ROWS_NAMED])
        more = f" and {len(without) - _ROWS_NAMED} more" if len(without) > _ROWS_NAMED else ""
        raise DataError(
            f"{len(without)} of {len(items)} items have no price ({named}{more}): give each one a true price"
        )
    return np.array([item.price for item in items], dtype=np.float64)


def _location(item: Item, index: int) -> str:
    return f"item {index}" if item.row is None else f"row {item.row}"


def _best(metric: str, figures: list[Figure]) -> float:
    """The best value of a column; NaN, which equals nothing, where fewer than two models have one."""
    defined = [float(figure) for figure in figures if figure == figure]
    if len(defined) < 2:
        return float("nan")
    return max(defined) if metric in HIGHER_IS_BETTER else min(defined)


def _cell(metric: str, figure: Figure, compact: bool) -> str:
    if figure != figure:
        return "–"
    if compact:
        text = _shortened(figure, _DECIMALS[metric], characters=6)
        low, high = (_shortened(bound, 2, characters=4) for bound in (figure.low, figure.high))
    else:
        text = f"{float(figure):.{_DECIMALS[metric]}f}"
        low, high = f"{figure.low:.1f}", f"{figure.high:.1f}"
    return f"{text} ({low}–{high})" if metric == "mae" else text


def _shortened(value: float, decimals: int, characters: int) -> str:
    """With at most `decimals`, and with fewer where the number would be longer than `characters`."""
    texts = (f"{value:.{places}f}" for places in range(decimals, 0, -1))
    return next((text for text in texts if len(text) <= characters), f"{value:.0f}")


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 else "<0.1"


def _escape(text: str) -> str:
    """A model's name inside a Markdown table cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
