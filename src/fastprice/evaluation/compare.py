"""Several models on the same unseen items: their guesses, their scores, and one table of them.

A model is a name and a function from N texts to N dollars. Nothing here knows how a model works, so base model, tuned
model and baselines are measured by the same code on the same items, the clock included.
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

__all__ = ["Evaluation", "ModelResult", "Predict", "evaluate_all", "evaluate_model"]

Predict = Callable[[list[str]], ArrayLike]

HIGHER_IS_BETTER = frozenset({"r2", "hit_rate"})
_HEADINGS = {"mae": "MAE $", "rmse": "RMSE $", "rmsle": "RMSLE", "mape": "MAPE %", "r2": "R²", "hit_rate": "hits %"}
_DECIMALS = {"mae": 2, "rmse": 2, "rmsle": 3, "mape": 1, "r2": 3, "hit_rate": 1}
_TIME_HEADING = "ms/item"
_ROWS_NAMED = 5


@dataclass(frozen=True, eq=False)
class ModelResult:
    """One model on the items of an Evaluation.

    guesses   N dollars, float64, in the order of the items
    seconds   wall time of the one call that predicted all N, warm-up included
    unparsed  items for which the model gave no price, so that a fallback stands in `guesses`
    note      one line for the reader of the table
    """

    name: str
    guesses: FloatArray
    scores: Scores
    seconds: float
    unparsed: int = 0
    note: str = ""

    @property
    def ms_per_item(self) -> float:
        return 1000.0 * self.seconds / len(self.guesses)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All models on the same items; `truths` holds the N prices of `items` in dollars, float64.

    `confidence` is that of every interval in `results`.
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

    def cells(self) -> list[list[tuple[str, bool]]]:
        """The table's body, one list a model: (text, is it the column's best), in the order of `headings`."""
        best = {
            metric: _best(metric, [getattr(result.scores, metric) for result in self.results]) for metric in _HEADINGS
        }
        return [
            [
                (result.name, False),
                *(
                    (_cell(metric, figure := getattr(result.scores, metric)), float(figure) == best[metric])
                    for metric in _HEADINGS
                ),
                (_milliseconds(result.ms_per_item), False),
            ]
            for result in self.results
        ]

    @staticmethod
    def headings() -> list[str]:
        return ["model", *_HEADINGS.values(), _TIME_HEADING]

    def footnotes(self) -> list[str]:
        """One line for each model that has a note or gave no price for some items."""
        lines = []
        for result in self.results:
            remarks = [result.note] if result.note else []
            if result.unparsed:
                of = f"{result.unparsed:,} of {len(self.items):,}"
                remarks.append(f"no price for {of} items, where a fallback counts")
            if remarks:
                lines.append(f"{result.name}: {'; '.join(remarks)}")
        return lines

    def table(self) -> Table:
        """The comparison as a rich table for the terminal; the best of each column is bold."""
        from rich.text import Text

        table = narrow_table(f"{len(self.items):,} items", self.footnotes())
        table.add_column(self.headings()[0], overflow="fold")
        for heading in self.headings()[1:]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.cells():
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
        """Plain values for JSON: the number of items and each model's figures; neither texts nor guesses."""
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


def evaluate_all(
    models: Mapping[str, Predict],
    items: Sequence[Item],
    *,
    fallback: float | None = None,
    notes: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Runs every model of `models` (name -> function from texts to dollars) on `items`, in the mapping's order.

    `fallback` and the rest are those of `evaluate_model`; `notes` holds a line for some of the names.
    Raises DataError, before any model runs, where an item has no true price.
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
    predict: Predict,
    items: Sequence[Item],
    *,
    fallback: float | None = None,
    note: str = "",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> ModelResult:
    """Times one call of `predict` on the texts of `items` and scores what it returns.

    A model that has no price for an item returns NaN there; `fallback` (dollars) then stands in and `unparsed` counts
    such items. Without a fallback a NaN is an error, as any other guess is that is not a finite number: DataError.
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
        padding=(0, 1, 0, 0),
    )


def true_prices(items: Sequence[Item]) -> FloatArray:
    """The prices of `items` in dollars, float64; DataError names the rows of those that have none."""
    if not items:
        raise DataError("there are no items to evaluate on: the test set is empty")
    without = [index for index, item in enumerate(items) if item.price is None]
    if without:
        named = ", ".join(_whereabouts(items[index], index) for index in without[:_ROWS_NAMED])
        more = f" and {len(without) - _ROWS_NAMED} more" if len(without) > _ROWS_NAMED else ""
        raise DataError(
            f"{len(without)} of {len(items)} items have no price ({named}{more}): give each one a true price"
        )
    return np.array([item.price for item in items], dtype=np.float64)


def _whereabouts(item: Item, index: int) -> str:
    return f"item {index}" if item.row is None else f"row {item.row}"


def _best(metric: str, figures: list[Figure]) -> float:
    """The best value of a column; NaN, which equals nothing, where fewer than two models can be compared."""
    defined = [float(figure) for figure in figures if figure == figure]
    if len(defined) < 2:
        return float("nan")
    return max(defined) if metric in HIGHER_IS_BETTER else min(defined)


def _cell(metric: str, figure: Figure) -> str:
    if figure != figure:
        return "–"
    text = f"{float(figure):.{_DECIMALS[metric]}f}"
    return f"{text} ({figure.low:.1f}–{figure.high:.1f})" if metric == "mae" else text


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 else "<0.1"


def _escape(text: str) -> str:
    """A model's name inside a Markdown table cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
