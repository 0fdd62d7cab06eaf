"""Prompting strategies ranked on the same unseen items: errors with paired intervals, time, tokens, and two baselines.

The baselines need no model: the median training price, and the median price of the neighbors that a retrieval strategy
shows (of the four best by BM25 where none is compared). A model with neighbors as examples is only useful if its errors
are smaller than those of their median.

The difference to the best is bootstrapped in pairs (`fastprice.evaluation.metrics`), so that what makes an item hard
for all cancels out. The best of several is partly so by sampling noise: with few items, an interval that contains zero
decides nothing. Time is wall time of everything that an item needs (retrieval, generation, decoding), after a first run
on the calibration items; fitting (building the index) is measured separately. Tokens are those of `QueryResult`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprice.common.arrays import FloatArray
from fastprice.data.items import Item
from fastprice.errors import ConfigError
from fastprice.evaluation.baselines import ConstantBaseline
from fastprice.evaluation.evaluate import narrow_table, true_prices
from fastprice.evaluation.metrics import Figure, Scores, paired_difference, score
from fastprice.inference.price_distribution import check_criterion
from fastprice.prompting.prompted_estimator import PromptedEstimator
from fastprice.prompting.registry import DEFAULT_EXAMPLES
from fastprice.prompting.retrieval import BM25Index, NearestNeighbors, Retrieval
from fastprice.prompting.strategy import Strategy

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from fastprice.estimator import PriceEstimator

__all__ = [
    "COVERAGE",
    "HEADINGS",
    "StrategyComparison",
    "StrategyResult",
    "check_unique_names",
    "compare_strategies",
    "format_difference",
    "ranking_metric",
]

COVERAGE = 0.9  # of the intervals
RANKED_BY = {"mae": "mae", "mse": "rmse", "rmsle": "rmsle", "mape": "mape", "hits": "hit_rate"}
HEADINGS = {"mae": "MAE $", "rmse": "RMSE $", "rmsle": "RMSLE", "mape": "MAPE %", "hit_rate": "hits %"}
_MIN_CALIBRATION_ITEMS = 9  # for intervals with a coverage of 90 %


@dataclass(frozen=True, eq=False)
class StrategyResult:
    """One strategy or baseline on the items of a `StrategyComparison`.

    Attributes:
        name: of the strategy.
        guesses: its estimates, float64 (N,), dollars, in the order of the items.
        scores: their metrics.
        seconds: wall time of prediction for N items.
        fit_seconds: wall time of `Strategy.fit`.
        prompt_tokens, generated_tokens: means per item; 0 for a baseline.
        texts_cut: number of items whose text was longer than max_tokens.
        tally: number of events by name.
        coverage: share of true prices inside the calibrated 90 % intervals, 0 to 1; None without calibration.
        median_width: of those intervals, dollars; None without calibration.
        is_baseline: whether no model is used.
    """

    name: str
    guesses: FloatArray
    scores: Scores
    seconds: float
    fit_seconds: float
    prompt_tokens: float = 0.0
    generated_tokens: float = 0.0
    texts_cut: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    coverage: float | None = None
    median_width: float | None = None
    is_baseline: bool = False

    @property
    def ms_per_item(self) -> float:
        """Wall time of prediction, milliseconds an item."""
        return 1000 * self.seconds / len(self.guesses)


@dataclass(frozen=True, eq=False)
class StrategyComparison:
    """Strategies and baselines on the same N items, as `compare_strategies` returns it.

    Attributes:
        truths: the true prices, float64 (N,), dollars.
        results: by rank, the best first.
        criterion: what the estimates minimize.
    """

    truths: FloatArray
    results: list[StrategyResult]
    criterion: str

    @property
    def metric(self) -> str:
        """The metric of the ranking, a name in `fastprice.evaluation.metrics.Scores`."""
        return ranking_metric(self.criterion)

    def difference(self, result: StrategyResult, reference: StrategyResult) -> Figure:
        """`metric` of `result` minus that of `reference`, with its paired 95 % bootstrap interval."""
        return paired_difference(self.truths, result.guesses, reference.guesses, self.metric)

    def table(self) -> Group:
        """The ranking for a terminal: two tables, errors and cost, since 80 columns do not hold one."""
        from rich.console import Group

        title = f"{len(self.truths):,} unseen items, ranked by {HEADINGS[self.metric]}"
        errors = self._columns(narrow_table(title, ()), slice(1, 4))
        costs = narrow_table("hits, 90 % intervals, time, tokens read and written", self.footnotes())
        return Group(errors, "", self._columns(costs, slice(4, None)))

    def _columns(self, table: Table, chosen: slice) -> Table:
        """`table` with the names of the results and the `chosen` columns of `headings`."""
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
        return ["strategy", *errors, "hits %", "coverage", "width $", "ms/item", "read", "written"]

    def rows(self) -> list[list[str]]:
        """The body of the table, a list of cells for each result, in the order of `headings`."""
        best = self.results[0]
        return [
            [
                result.name,
                f"{result.scores.mae:.1f} ({result.scores.mae.low:.1f}–{result.scores.mae.high:.1f})",
                f"{result.scores.rmsle:.3f}",
                "best" if result is best else format_difference(self.difference(result, best), self.metric),
                f"{result.scores.hit_rate:.1f}",
                "–" if result.coverage is None else f"{100 * result.coverage:.1f} %",
                "–" if result.median_width is None else f"{result.median_width:,.0f}",
                f"{result.ms_per_item:.1f}",
                f"{result.prompt_tokens:.0f}",
                f"{result.generated_tokens:.1f}",
            ]
            for result in self.results
        ]

    def footnotes(self) -> list[str]:
        """A line for each result with events: examples dropped, calls answered, texts truncated."""
        lines = []
        for result in self.results:
            events = [f"{count:,} {what}" for what, count in result.tally.items() if count]
            events += [f"{result.texts_cut:,} texts cut"] if result.texts_cut else []
            if events:
                lines.append(f"{result.name}: {', '.join(events)}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; differences to the best, and to zero-shot where it was compared."""
        zero_shot = next((result for result in self.results if result.name == "zero-shot"), None)
        return {
            "items": len(self.truths),
            "criterion": self.criterion,
            "ranked_by": self.metric,
            "entries": [
                {
                    "name": result.name,
                    "baseline": result.is_baseline,
                    "scores": result.scores.as_dict(),
                    "to_best": self.difference(result, self.results[0]).as_dict(),
                    "to_zero_shot": None if zero_shot is None else self.difference(result, zero_shot).as_dict(),
                    "held_90": result.coverage,
                    "width_90": result.median_width,
                    "ms_per_item": result.ms_per_item,
                    "fit_seconds": result.fit_seconds,
                    "prompt_tokens_per_item": result.prompt_tokens,
                    "generated_tokens_per_item": result.generated_tokens,
                    "texts_cut": result.texts_cut,
                    "tally": dict(result.tally),
                }
                for result in self.results
            ],
        }


def ranking_metric(criterion: str) -> str:
    """The metric by which estimates for `criterion` are ranked; ConfigError for an unknown criterion."""
    check_criterion(criterion)
    return RANKED_BY[criterion]


def check_unique_names(strategies: Sequence[Strategy]) -> None:
    """ConfigError for a strategy named twice: "few-shot" is "few-shot:4"."""
    names = [strategy.name for strategy in strategies]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"strategy {twice[0]!r} is named more than once; name each one once")


def compare_strategies(
    estimator: PriceEstimator,
    strategies: Sequence[Strategy],
    train: Sequence[Item],
    calibration: Sequence[Item],
    test: Sequence[Item],
    *,
    criterion: str = "mae",
    on_items: Callable[[str, int], None] | None = None,
) -> StrategyComparison:
    """Estimates the prices of `test` by `estimator` with each strategy, and ranks the results.

    Args:
        estimator: fitted, loaded, or only prepared.
        strategies: to compare; `fit` is called on each.
        train: priced items that strategies may show, and that baselines are fitted on.
        calibration: priced items for the intervals, at least 9 of them; with fewer there are no intervals.
        test: priced items, on which all are compared.
        criterion: what the estimates minimize, and so the metric of the ranking.
        on_items: called with a strategy's name and the number of items finished since the last call.

    Raises ConfigError for an unknown criterion or a strategy named twice, DataError for items without a price.
    """
    metric = ranking_metric(criterion)
    check_unique_names(strategies)
    truths = true_prices(test)
    results = [
        _evaluate_strategy(estimator, strategy, train, calibration, test, truths, criterion, on_items)
        for strategy in strategies
    ]
    results += _evaluate_baselines(strategies, train, test, truths)
    sign = -1 if metric == "hit_rate" else 1
    results.sort(key=lambda result: sign * float(getattr(result.scores, metric)))
    return StrategyComparison(truths, results, criterion)


def _evaluate_strategy(
    estimator: PriceEstimator,
    strategy: Strategy,
    train: Sequence[Item],
    calibration: Sequence[Item],
    test: Sequence[Item],
    truths: FloatArray,
    criterion: str,
    on_items: Callable[[str, int], None] | None,
) -> StrategyResult:
    finished = 0

    def report(now_finished: int) -> None:
        nonlocal finished
        if on_items:
            on_items(strategy.name, now_finished - finished)
        finished = now_finished

    start = time.perf_counter()
    prompted = PromptedEstimator(estimator, strategy, train)
    fitted = time.perf_counter()
    if len(calibration) >= _MIN_CALIBRATION_ITEMS:
        prompted.calibrate(calibration, on_items=report)
    finished = 0
    begun = time.perf_counter()
    queried = prompted.query(test, on_items=report)
    guesses = prompted.estimates(queried.distributions, criterion)
    seconds = time.perf_counter() - begun
    coverage = median_width = None
    if prompted.calibration_ is not None and prompted.calibration_.max_coverage >= COVERAGE:
        bounds = prompted.intervals(queried.distributions, COVERAGE)
        coverage = float(((bounds[:, 0] <= truths) & (truths <= bounds[:, 1])).mean())
        median_width = float(np.median(np.diff(bounds)))
    return StrategyResult(
        strategy.name,
        guesses,
        score(truths, guesses),
        seconds,
        fitted - start,
        prompt_tokens=float(queried.prompt_tokens.mean()),
        generated_tokens=float(queried.generated_tokens.mean()),
        texts_cut=queried.texts_cut,
        tally=queried.tally,
        coverage=coverage,
        median_width=median_width,
    )


def _evaluate_baselines(
    strategies: Sequence[Strategy], train: Sequence[Item], test: Sequence[Item], truths: FloatArray
) -> list[StrategyResult]:
    """The median training price, and the median of the neighbors of each retrieval strategy, or of BM25's."""
    begun = time.perf_counter()
    constant = ConstantBaseline().fit([item.text for item in train], true_prices(train))
    fitted = time.perf_counter()
    guesses = constant.predict([item.text for item in test])
    seconds = time.perf_counter() - fitted
    results = [_baseline_result(constant.name, guesses, truths, seconds, fitted - begun)]
    searches = {each.name: each.neighbors for each in strategies if isinstance(each, Retrieval)}
    for name, neighbors in (
        searches or {f"retrieval:{DEFAULT_EXAMPLES}": NearestNeighbors(DEFAULT_EXAMPLES, BM25Index())}
    ).items():
        begun = time.perf_counter()
        if not searches:
            neighbors.fit(train)
        fitted = time.perf_counter()
        guesses = neighbors.median_prices(test)
        seconds = time.perf_counter() - fitted
        results.append(_baseline_result(f"median of {name}", guesses, truths, seconds, fitted - begun))
    return results


def _baseline_result(
    name: str, guesses: FloatArray, truths: FloatArray, seconds: float, fit_seconds: float
) -> StrategyResult:
    return StrategyResult(name, guesses, score(truths, guesses), seconds, fit_seconds, is_baseline=True)


def format_difference(figure: Figure, metric: str) -> str:
    """A difference with its sign and its interval: "+1.2 (-0.3 to +2.5)"."""
    digits = 3 if metric == "rmsle" else 1
    return f"{figure:+.{digits}f} ({figure.low:+.{digits}f} to {figure.high:+.{digits}f})"
