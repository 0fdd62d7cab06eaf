"""Strategies ranked on the same unseen items: errors with paired intervals, time, tokens, beside two cheap baselines.

The baselines ask no model: the median training price, and the median price of the neighbors that a retrieval strategy
shows (of the four best by BM25 where none is compared). A model that is shown neighbors and does not beat their median
has added nothing.

Every figure comes from the same items. The difference to the best is bootstrapped in pairs (fastprice.evaluation.metrics), so that
what makes an item hard for all cancels. The best of several is partly the luckiest: with few items, look at how far the
intervals of the others reach across zero before believing the order.

Time is wall time of everything an item takes (looking up neighbors, the model's own writing, decoding), after a first
run on the calibration items; fitting (building the index) is told apart. Tokens are as `Answers` counts them.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprice.common.arrays import FloatArray
from fastprice.common.plots import check_plot, save_plot
from fastprice.data.items import Item
from fastprice.errors import ConfigError
from fastprice.evaluation.baselines import ConstantBaseline
from fastprice.evaluation.evaluate import narrow_table, true_prices
from fastprice.evaluation.metrics import Figure, Scores, paired_difference, score
from fastprice.inference.price_distribution import check_criterion
from fastprice.prompting.prompted_estimator import PromptedEstimator
from fastprice.prompting.registry import EXAMPLES
from fastprice.prompting.retrieval import BM25Index, Neighbors, Retrieval
from fastprice.prompting.strategy import Strategy

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from fastprice.estimator import PriceEstimator

__all__ = ["COVERAGE", "Comparison", "Entry", "check_names", "compare_strategies", "metric_of"]

COVERAGE = 0.9
RANKED_BY = {"mae": "mae", "mse": "rmse", "rmsle": "rmsle", "mape": "mape", "hits": "hit_rate"}
HEADINGS = {"mae": "MAE $", "rmse": "RMSE $", "rmsle": "RMSLE", "mape": "MAPE %", "hit_rate": "hits %"}
_LEAST_CALIBRATION = 9  # items that can vouch for a coverage of 90 %


@dataclass(frozen=True, eq=False)
class Entry:
    """One strategy, or a baseline, which asks no model.

    guesses                  N dollars, in the order of the items
    seconds, fit_seconds     wall time of answering N items, and of preparing to
    prompt_tokens, generated_tokens   means an item; 0 for a baseline
    cut                      items whose text was longer than max_tokens
    held, width              share of true prices in the calibrated 90 % interval, and its median width in dollars; None
                             without calibration
    """

    name: str
    guesses: FloatArray
    scores: Scores
    seconds: float
    fit_seconds: float
    prompt_tokens: float = 0.0
    generated_tokens: float = 0.0
    cut: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    held: float | None = None
    width: float | None = None
    baseline: bool = False

    @property
    def ms_per_item(self) -> float:
        return 1000 * self.seconds / len(self.guesses)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Entries by rank, the best first, on N items with the true prices `truths` (dollars)."""

    truths: FloatArray
    entries: list[Entry]
    criterion: str

    @property
    def metric(self) -> str:
        """The figure that entries are ranked by, a name in fastprice.evaluation.metrics."""
        return metric_of(self.criterion)

    def difference(self, entry: Entry, reference: Entry) -> Figure:
        """`metric` of `entry` less that of `reference`, with its paired 95 % bootstrap interval."""
        return paired_difference(self.truths, entry.guesses, reference.guesses, self.metric)

    def table(self) -> Group:
        """The ranking for a terminal: two tables, errors and cost, since 80 columns do not hold one."""
        from rich.console import Group

        title = f"{len(self.truths):,} unseen items, ranked by {HEADINGS[self.metric]}"
        errors = self._columns(narrow_table(title, ()), slice(1, 4))
        costs = narrow_table("hits, 90 % intervals, time, tokens read and written", self.footnotes())
        return Group(errors, "", self._columns(costs, slice(4, None)))

    def _columns(self, table: Table, chosen: slice) -> Table:
        """`table` with the names of the entries and the columns of `headings` that are chosen."""
        from rich.text import Text

        table.add_column(self.headings()[0], overflow="fold")
        for heading in self.headings()[chosen]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows():
            # Text, not str: a strategy's name may hold square brackets, which rich would read as markup.
            table.add_row(Text(row[0]), *row[chosen])
        return table

    def headings(self) -> list[str]:
        to_best = f"{HEADINGS[self.metric]} to the best (95 %)"
        errors = ["MAE $ (95 %)", "RMSLE", to_best]
        return ["strategy", *errors, "hits %", "90 % held", "width $", "ms/item", "read", "written"]

    def rows(self) -> list[list[str]]:
        """The table's body, a list of cells an entry, in the order of `headings`."""
        best = self.entries[0]
        return [
            [
                entry.name,
                f"{entry.scores.mae:.1f} ({entry.scores.mae.low:.1f}–{entry.scores.mae.high:.1f})",
                f"{entry.scores.rmsle:.3f}",
                "best" if entry is best else signed(self.difference(entry, best), self.metric),
                f"{entry.scores.hit_rate:.1f}",
                "–" if entry.held is None else f"{100 * entry.held:.1f} %",
                "–" if entry.width is None else f"{entry.width:,.0f}",
                f"{entry.ms_per_item:.1f}",
                f"{entry.prompt_tokens:.0f}",
                f"{entry.generated_tokens:.1f}",
            ]
            for entry in self.entries
        ]

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws the strategies by rank (fastprice.prompting.plot) as PNG, SVG or PDF by the ending; returns `path`.

        Raises as fastprice.common.plots.check_plot: ConfigError for another ending or a folder that does not exist.
        """
        from fastprice.prompting.plot import draw_comparison

        target = check_plot(path)
        save_plot(draw_comparison(self), target)
        return target

    def footnotes(self) -> list[str]:
        """A line for each entry that had something to tell: examples dropped, calls made, texts cut."""
        lines = []
        for entry in self.entries:
            told = [f"{count:,} {what}" for what, count in entry.tally.items() if count]
            told += [f"{entry.cut:,} texts cut"] if entry.cut else []
            if told:
                lines.append(f"{entry.name}: {', '.join(told)}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; differences to the best, and to zero-shot where it was compared."""
        zero_shot = next((entry for entry in self.entries if entry.name == "zero-shot"), None)
        return {
            "items": len(self.truths),
            "criterion": self.criterion,
            "ranked_by": self.metric,
            "entries": [
                {
                    "name": entry.name,
                    "baseline": entry.baseline,
                    "scores": entry.scores.as_dict(),
                    "to_best": self.difference(entry, self.entries[0]).as_dict(),
                    "to_zero_shot": None if zero_shot is None else self.difference(entry, zero_shot).as_dict(),
                    "held_90": entry.held,
                    "width_90": entry.width,
                    "ms_per_item": entry.ms_per_item,
                    "fit_seconds": entry.fit_seconds,
                    "prompt_tokens_per_item": entry.prompt_tokens,
                    "generated_tokens_per_item": entry.generated_tokens,
                    "texts_cut": entry.cut,
                    "tally": dict(entry.tally),
                }
                for entry in self.entries
            ],
        }


def metric_of(criterion: str) -> str:
    """The figure that estimates for `criterion` are ranked by; ConfigError for an unknown criterion."""
    check_criterion(criterion)
    return RANKED_BY[criterion]


def check_names(strategies: Sequence[Strategy]) -> None:
    """ConfigError for a strategy named twice: "few-shot" is "few-shot:4"."""
    names = [strategy.name for strategy in strategies]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"strategy {twice[0]!r} is named more than once")


def compare_strategies(
    estimator: PriceEstimator,
    strategies: Sequence[Strategy],
    train: Sequence[Item],
    calibration: Sequence[Item],
    test: Sequence[Item],
    *,
    criterion: str = "mae",
    on_items: Callable[[str, int], None] | None = None,
) -> Comparison:
    """Asks `estimator` for the prices of `test` by each strategy, and ranks the answers.

    train        what strategies may show and baselines learn from
    calibration  priced items for the intervals, at least 9 of them, else there are none
    on_items     is told the strategy at work and how many more items it has done

    Raises ConfigError for an unknown criterion or a strategy named twice, DataError for items without a price.
    """
    metric = metric_of(criterion)
    check_names(strategies)
    truths = true_prices(test)
    entries = [
        _asked(estimator, strategy, train, calibration, test, truths, criterion, on_items) for strategy in strategies
    ]
    entries += _baselines(strategies, train, test, truths)
    sign = -1 if metric == "hit_rate" else 1
    entries.sort(key=lambda entry: sign * float(getattr(entry.scores, metric)))
    return Comparison(truths, entries, criterion)


def _asked(
    estimator: PriceEstimator,
    strategy: Strategy,
    train: Sequence[Item],
    calibration: Sequence[Item],
    test: Sequence[Item],
    truths: FloatArray,
    criterion: str,
    on_items: Callable[[str, int], None] | None,
) -> Entry:
    done = 0

    def told(so_far: int) -> None:
        nonlocal done
        if on_items:
            on_items(strategy.name, so_far - done)
        done = so_far

    start = time.perf_counter()
    prompted = PromptedEstimator(estimator, strategy, train)
    fitted = time.perf_counter()
    if len(calibration) >= _LEAST_CALIBRATION:
        prompted.calibrate(calibration, on_items=told)
    done = 0
    begun = time.perf_counter()
    answers = prompted.ask(test, on_items=told)
    guesses = prompted.estimates(answers.distributions, criterion)
    seconds = time.perf_counter() - begun
    held = width = None
    if prompted.calibration_ is not None and prompted.calibration_.max_coverage >= COVERAGE:
        bounds = prompted.intervals(answers.distributions, COVERAGE)
        held = float(((bounds[:, 0] <= truths) & (truths <= bounds[:, 1])).mean())
        width = float(np.median(np.diff(bounds)))
    return Entry(
        strategy.name,
        guesses,
        score(truths, guesses),
        seconds,
        fitted - start,
        prompt_tokens=float(answers.prompt_tokens.mean()),
        generated_tokens=float(answers.generated_tokens.mean()),
        cut=answers.cut,
        tally=answers.tally,
        held=held,
        width=width,
    )


def _baselines(
    strategies: Sequence[Strategy], train: Sequence[Item], test: Sequence[Item], truths: FloatArray
) -> list[Entry]:
    """The constant, and the median of the neighbors of each retrieval strategy, or of BM25's."""
    begun = time.perf_counter()
    constant = ConstantBaseline().fit([item.text for item in train], true_prices(train))
    fitted = time.perf_counter()
    guesses = constant.predict([item.text for item in test])
    seconds = time.perf_counter() - fitted
    entries = [_baseline(constant.name, guesses, truths, seconds, fitted - begun)]
    looked_up = {each.name: each.neighbors for each in strategies if isinstance(each, Retrieval)}
    for name, neighbors in (looked_up or {f"retrieval:{EXAMPLES}": Neighbors(EXAMPLES, BM25Index())}).items():
        begun = time.perf_counter()
        if not looked_up:
            neighbors.fit(train)
        fitted = time.perf_counter()
        guesses = neighbors.median_prices(test)
        seconds = time.perf_counter() - fitted
        entries.append(_baseline(f"median of {name}", guesses, truths, seconds, fitted - begun))
    return entries


def _baseline(name: str, guesses: FloatArray, truths: FloatArray, seconds: float, fit_seconds: float) -> Entry:
    return Entry(name, guesses, score(truths, guesses), seconds, fit_seconds, baseline=True)


def signed(figure: Figure, metric: str) -> str:
    digits = 3 if metric == "rmsle" else 1
    return f"{figure:+.{digits}f} ({figure.low:+.{digits}f} to {figure.high:+.{digits}f})"
