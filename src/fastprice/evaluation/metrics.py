"""Metrics of estimates against true prices: six figures, each with a bootstrap confidence interval over items.

Every figure is a function of K sums over items (of |error|, error squared, ...). A bootstrap resample of the items is
a row of counts w_N with the sum N, so R resamples are one matrix product w_RN @ columns_NK, in chunks of at most
`_CHUNK_BYTES`: 10,000 items and 1,000 resamples take a fraction of a second and need no R x N array.

The intervals are percentile bootstrap intervals (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
chapter 13). They are the sampling noise of the items: how much a figure would change with another draw from the same
source. They say nothing about another source, or about another training run.

Legend: N items, R resamples, K columns of per-item quantities, M metrics. Prices and errors are dollars, float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprice.common.arrays import FloatArray
from fastprice.errors import ConfigError, DataError
from fastprice.inference.price_distribution import HIT_DOLLARS, HIT_SHARE

__all__ = ["METRICS", "Figure", "Scores", "paired_difference", "score"]


METRICS = ("mae", "rmse", "rmsle", "mape", "r2", "hit_rate")

_CHUNK_BYTES = 32 * 2**20
_LARGEST = 1e100  # dollars; the squares of larger errors may overflow float64


class Figure(float):
    """A metric with its confidence interval: a float with two attributes.

    In arithmetic, comparison, formatting and JSON it is an ordinary float.

    Attributes:
        low: the lower end of the interval, in the metric's own unit.
        high: the upper end.
    """

    low: float
    high: float

    def __new__(cls, value: float, low: float, high: float) -> Figure:
        figure = super().__new__(cls, value)
        figure.low = float(low)
        figure.high = float(high)
        return figure

    def __getnewargs__(self) -> tuple[float, float, float]:  # type: ignore[override]  # float's own takes no interval
        return float(self), self.low, self.high

    def __repr__(self) -> str:
        return f"Figure({float(self)!r}, low={self.low!r}, high={self.high!r})"

    def as_dict(self) -> dict[str, float | None]:
        """`{"value", "low", "high"}`, an undefined number as None: JSON has no NaN."""
        named = {"value": float(self), "low": self.low, "high": self.high}
        return {name: None if isnan(number) else number for name, number in named.items()}


@dataclass(frozen=True)
class Scores:
    """The metrics of estimates on `n` items, as `score` returns them; each is a float with an interval (`Figure`).

    Attributes:
        mae: mean |error|, dollars.
        rmse: root of the mean squared error, dollars.
        rmsle: root mean squared difference of ln(1 + price); a negative estimate counts as $0 here, and only here.
        mape: mean of |error| / true price, percent.
        r2: 1 - squared error / variance of the true prices; NaN where they do not vary (so for one item).
        hit_rate: share of hits, percent: items with |error| < $40 or |error| < 20 % of the true price.
        n: number of items.
    """

    mae: Figure
    rmse: Figure
    rmsle: Figure
    mape: Figure
    r2: Figure
    hit_rate: Figure
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON: `{"mae": {"value", "low", "high"}, ..., "n"}`."""
        return {**{name: getattr(self, name).as_dict() for name in METRICS}, "n": self.n}


def score(
    truths: ArrayLike, guesses: ArrayLike, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Scores:
    """The metrics of estimates against true prices, with bootstrap intervals over the items.

    Args:
        truths: N true prices in dollars, above 0.
        guesses: N estimates in dollars, of the same items in the same order.
        confidence: share of resamples inside each interval.
        resamples: number of bootstrap resamples.
        seed: of the resamples; same arguments, same result.

    With one item the intervals have no width and `r2` is NaN; resamples whose true prices are all equal are left out of
    the interval of `r2`.

    Raises DataError for no items, lengths that differ, a true price that is not above $0, an estimate that is not a
    finite number; ConfigError for an impossible `confidence` or `resamples`.
    """
    truths_N = _truths(truths)
    columns_NK = _columns(truths_N, _guesses(guesses, len(truths_N), "guesses"))
    _check_bootstrap(confidence, resamples)

    n = len(truths_N)
    values_M = _figures(columns_NK.sum(axis=0, keepdims=True), n)[0]
    spread_RM = _figures(_bootstrap_sums(columns_NK, resamples, seed), n)
    figures = {
        metric: _figure(value, spread_R, confidence)
        for metric, value, spread_R in zip(METRICS, values_M, spread_RM.T, strict=True)
    }
    return Scores(**figures, n=n)


def paired_difference(
    truths: ArrayLike,
    guesses_a: ArrayLike,
    guesses_b: ArrayLike,
    metric: str = "mae",
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Figure:
    """The `metric` of estimates A less that of B on the same items, with a paired bootstrap interval.

    Each resample draws items, and with each item both estimates: what makes an item hard for both cancels, so this
    interval is much narrower than two separate intervals suggest. Below zero A is better, but for `r2` and `hit_rate`,
    where it is above zero. An interval without zero in it is a difference beyond sampling noise.

    Raises as `score` does, and ConfigError for an unknown `metric`.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}: name one of {', '.join(METRICS)}")
    truths_N = _truths(truths)
    n = len(truths_N)
    columns_a_NK = _columns(truths_N, _guesses(guesses_a, n, "guesses_a"))
    columns_b_NK = _columns(truths_N, _guesses(guesses_b, n, "guesses_b"))
    _check_bootstrap(confidence, resamples)

    def difference(sums_RK: FloatArray) -> FloatArray:
        sums_a_RK, sums_b_RK = np.split(sums_RK, 2, axis=1)
        which = METRICS.index(metric)
        return _figures(sums_a_RK, n)[:, which] - _figures(sums_b_RK, n)[:, which]

    both_NK = np.hstack([columns_a_NK, columns_b_NK])
    value = float(difference(both_NK.sum(axis=0, keepdims=True))[0])
    return _figure(value, difference(_bootstrap_sums(both_NK, resamples, seed)), confidence)


def _columns(truths_N: FloatArray, guesses_N: FloatArray) -> FloatArray:
    """The per-item quantities whose sums give every figure: (N, K)."""
    error_N = np.abs(guesses_N - truths_N)
    log_error_N = np.log1p(np.maximum(guesses_N, 0.0)) - np.log1p(truths_N)
    hit_N = (error_N < HIT_DOLLARS) | (HIT_SHARE * error_N < truths_N)
    # Less their median: a variance from sums of squares loses digits where the mean is large, and the median of equal
    # numbers is exactly that number.
    shifted_N = truths_N - np.median(truths_N)
    return np.column_stack(
        [error_N, error_N**2, log_error_N**2, error_N / truths_N, hit_N.astype(np.float64), shifted_N, shifted_N**2]
    )


def _figures(sums_RK: FloatArray, n: int) -> FloatArray:
    """Sums over `n` items -> the figures in the order of METRICS: (R, 6)."""
    absolute, squared, squared_log, share, hits, shifted, shifted_squared = sums_RK.T
    variation = shifted_squared - shifted**2 / n
    # Rounding leaves about 1e-16 of the sum of squares of a variation of zero.
    varies = variation > 1e-12 * shifted_squared
    r2 = np.full(len(sums_RK), np.nan)
    r2[varies] = 1.0 - squared[varies] / variation[varies]
    return np.column_stack(
        [
            absolute / n,
            np.sqrt(squared / n),
            np.sqrt(squared_log / n),
            100.0 * share / n,
            r2,
            100.0 * hits / n,
        ]
    )


def _bootstrap_sums(columns_NK: FloatArray, resamples: int, seed: int) -> FloatArray:
    """Column sums of `resamples` draws of N items with replacement: (R, K)."""
    n = len(columns_NK)
    random = np.random.default_rng(seed)
    chunk = max(1, min(resamples, _CHUNK_BYTES // (8 * n)))
    counts_CN = np.empty((chunk, n))
    sums_RK = np.empty((resamples, columns_NK.shape[1]))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        for row in range(size):
            counts_CN[row] = np.bincount(random.integers(0, n, size=n), minlength=n)
        sums_RK[start : start + size] = counts_CN[:size] @ columns_NK
    return sums_RK


def _figure(value: float, spread_R: FloatArray, confidence: float) -> Figure:
    defined = spread_R[~np.isnan(spread_R)]
    if isnan(value) or not len(defined):
        return Figure(value, np.nan, np.nan)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Figure(value, low, high)


def _truths(truths: ArrayLike) -> FloatArray:
    truths_N = _numbers(truths, "truths")
    if not len(truths_N):
        raise DataError("there are no items to score: give at least one true price and its estimate")
    _refuse_first(~(truths_N > 0), truths_N, "truths", "a true price is above $0; leave out items without one")
    return truths_N


def _guesses(guesses: ArrayLike, n: int, name: str) -> FloatArray:
    guesses_N = _numbers(guesses, name)
    if len(guesses_N) != n:
        raise DataError(f"{n} truths and {len(guesses_N)} {name}: give one of each for every item, in the same order")
    return guesses_N


def _numbers(values: ArrayLike, name: str) -> FloatArray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} are not all numbers ({error}): give dollars as floats") from error
    if array.ndim != 1:
        raise DataError(f"{name} have shape {array.shape}: give one number an item, a flat list or array")
    unusable_N = ~np.isfinite(array) | (np.abs(array) > _LARGEST)
    _refuse_first(unusable_N, array, name, "give a finite number of dollars for every item")
    return array


def _refuse_first(refused_N: NDArray[np.bool_], values_N: FloatArray, name: str, remedy: str) -> None:
    if refused_N.any():
        first = int(np.argmax(refused_N))
        more = f" (and {int(refused_N.sum()) - 1} more)" if refused_N.sum() > 1 else ""
        raise DataError(f"{name}[{first}] is {float(values_N[first])}{more}: {remedy}")


def _check_bootstrap(confidence: float, resamples: int) -> None:
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}: give at least 1, usually 1000")
