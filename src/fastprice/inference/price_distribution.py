"""`PriceDistribution`: the probabilities of all prices of one item, and the estimate that is best for a criterion.

A criterion says which summary of a distribution is the best estimate g. It minimizes, over p(price):

    "mae"     E |g - price|                            the median
    "mse"     E (g - price)^2                          the mean
    "rmsle"   E (ln(1 + g) - ln(1 + price))^2          exp(E ln(1 + price)) - 1
    "mape"    E |g - price| / price                    the median under weights p(price) / price
    "hits"    P(|g - price| >= $40 and >= 20 % of it)  the middle of the window that hits most often

Part of the probability may be missing: mass that decoding left out, or that the model gives to something else than a
price. Every summary is of the prices found, with their probabilities rescaled to sum to 1; NaN where nothing was found.

Legend: K prices of one distribution. Prices are dollars, float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from fastprice.common.arrays import FloatArray
from fastprice.errors import ConfigError, DataError, nearest_name

__all__ = ["CRITERIA", "HIT_DOLLARS", "HIT_SHARE", "PriceDistribution", "check_criterion"]


# A hit is an estimate within $40 or within 1/5 = 20 % of the true price; 5 * |error| < price is exact where 0.2 * price
# rounds.
HIT_DOLLARS = 40.0
HIT_SHARE = 5.0

_ROUNDING = 1e-4  # float32 softmaxes may sum to a little more than 1


@dataclass(frozen=True, eq=False)
class PriceDistribution:
    """The probability of each price of one item, as `PriceEstimator.predict_distribution` returns it.

    Attributes:
        prices: dollars, float64 (K,), ascending and above 0; read-only. Whole dollars where the model's tokens were
            read, the points of the bins or quantiles where a price head was.
        probabilities: float64 (K,), their sum is 1 - `missing_mass`; read-only.

    K may be 0: no price was found, and every summary is NaN. Raises DataError for arrays that are no distribution.
    """

    prices: FloatArray
    probabilities: FloatArray

    def __post_init__(self) -> None:
        prices, probabilities = _read_only(self.prices), _read_only(self.probabilities)
        if prices.ndim != 1 or prices.shape != probabilities.shape:
            raise DataError(
                f"prices have shape {prices.shape}, probabilities {probabilities.shape}: give each price "
                "one probability"
            )
        if len(prices) and not (prices[0] > 0 and np.isfinite(prices[-1]) and (np.diff(prices) > 0).all()):
            raise DataError("the prices of a distribution must be finite, above $0 and strictly ascending")
        if not ((probabilities >= 0).all() and probabilities.sum() <= 1 + _ROUNDING):
            raise DataError("the probabilities of a distribution must be at least 0 and sum to at most 1")
        object.__setattr__(self, "prices", prices)
        object.__setattr__(self, "probabilities", probabilities)

    def __repr__(self) -> str:
        # One line, and not the thousand numbers that a dataclass would show for each text of a list.
        if self.is_empty:
            return "PriceDistribution(no price, missing_mass=1)"
        found = f"{len(self.prices):,} prices, ${self.prices[0]:,g} to ${self.prices[-1]:,g}"
        return f"PriceDistribution({found}, median=${self.median():,g}, missing_mass={self.missing_mass:.3g})"

    @cached_property
    def missing_mass(self) -> float:
        """The probability of everything that is not among `prices`, from 0 to 1."""
        return float(max(0.0, 1.0 - self.probabilities.sum()))

    @property
    def is_empty(self) -> bool:
        """Whether no price has any probability, so that every summary is NaN."""
        return len(self._weights) == 0

    def median(self) -> float:
        """The median in dollars, the lowest price that half of the mass does not exceed; minimizes E |g - price|."""
        return self.quantile(0.5)

    def mean(self) -> float:
        """The mean in dollars; minimizes E (g - price)^2."""
        return float(self.prices @ self._weights) if not self.is_empty else np.nan

    def log_mean(self) -> float:
        """exp(E ln(1 + price)) - 1 in dollars; minimizes E (ln(1 + g) - ln(1 + price))^2."""
        return float(np.expm1(np.log1p(self.prices) @ self._weights)) if not self.is_empty else np.nan

    def relative_median(self) -> float:
        """The median in dollars when each price weighs p(price) / price; minimizes E |g - price| / price."""
        return _quantile(self.prices, np.cumsum(_normalized(self.probabilities / self.prices)), 0.5)

    def best_hit(self) -> float:
        """The estimate in dollars that most probably lies within $40 or within 20 % of the price.

        A price p is hit from everywhere in the open window p -/+ max($40, 20 % of p). The result is the middle of the
        interval that lies in the heaviest set of windows; of several such intervals, of the one nearest to the median.
        """
        if self.is_empty:
            return np.nan
        reach = np.maximum(HIT_DOLLARS, self.prices / HIT_SHARE)
        ends = np.concatenate([self.prices - reach, self.prices + reach])
        order = np.argsort(ends, kind="stable")
        ends = ends[order]
        # Weight of the windows open between one end and the next. Nothing lies between equal ends.
        inside = np.cumsum(np.concatenate([self._weights, -self._weights])[order])[:-1]
        inside[ends[1:] <= ends[:-1]] = -1.0
        heaviest = np.flatnonzero(inside >= inside.max() - 1e-12)
        middles = (ends[heaviest] + ends[heaviest + 1]) / 2
        return float(middles[np.argmin(np.abs(middles - self.median()))])

    def quantile(self, q: float) -> float:
        """The lowest price, in dollars, such that at least a share `q` (0 to 1) of the mass found does not exceed it.

        Raises ConfigError for a share that is not from 0 to 1.
        """
        if not 0.0 <= q <= 1.0:
            raise ConfigError(f"a quantile's share is {q}: give one from 0 to 1")
        return _quantile(self.prices, self._cumulative, q)

    def interval(self, coverage: float) -> tuple[float, float]:
        """(low, high) in dollars: the central interval, between the quantiles (1 - coverage)/2 and (1 + coverage)/2.

        Central and not of highest density: it is the same on the log of price, and never in several pieces. This is the
        model's own claim, which real prices may not confirm; `Calibration.interval` has calibrated coverage. Raises
        ConfigError for a coverage that is not between 0 and 1.
        """
        if not 0.0 < coverage < 1.0:
            raise ConfigError(f"coverage is {coverage}: give a share between 0 and 1, such as 0.9")
        return self.quantile((1 - coverage) / 2), self.quantile((1 + coverage) / 2)

    def cdf(self, price: float) -> float:
        """The share of the mass found on prices of at most `price` dollars."""
        if self.is_empty:
            return np.nan
        at_most = int(np.searchsorted(self.prices, price, side="right"))
        return float(min(self._cumulative[at_most - 1], 1.0)) if at_most else 0.0

    def estimate(self, criterion: str = "mae") -> float:
        """The estimate in dollars that minimizes `criterion`: mae, mse, rmsle, mape or hits.

        Raises ConfigError for an unknown criterion.
        """
        check_criterion(criterion)
        return CRITERIA[criterion](self)

    @cached_property
    def _weights(self) -> FloatArray:
        """Probabilities given that the price is among those found (K,), or empty."""
        return _normalized(self.probabilities)

    @cached_property
    def _cumulative(self) -> FloatArray:
        """P(at most each price), given that it is among those found (K,), or empty."""
        return np.cumsum(self._weights)


CRITERIA: dict[str, Callable[[PriceDistribution], float]] = {
    "mae": PriceDistribution.median,
    "mse": PriceDistribution.mean,
    "rmsle": PriceDistribution.log_mean,
    "mape": PriceDistribution.relative_median,
    "hits": PriceDistribution.best_hit,
}


def check_criterion(criterion: str) -> None:
    """Raises ConfigError for a criterion that is not a key of `CRITERIA`."""
    if criterion not in CRITERIA:
        raise ConfigError(
            f"unknown criterion {criterion!r}{nearest_name(criterion, CRITERIA)}: name one of {', '.join(CRITERIA)}"
        )


def _read_only(values: ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64).view()
    array.flags.writeable = False
    return array


def _normalized(weights: FloatArray) -> FloatArray:
    """`weights` (K,) over their sum; empty where they are all 0."""
    largest = weights.max(initial=0.0)
    if not largest > 0:
        return np.empty(0)
    scaled = weights / largest  # first: a sum below the smallest normal number has no inverse
    share: FloatArray = scaled / scaled.sum()
    return share


def _quantile(prices: FloatArray, cumulative: FloatArray, q: float) -> float:
    if not len(cumulative):
        return np.nan
    # Rounding may leave the last share below 1, or one slightly above q; q = 0 is the first price with any mass.
    share = max(min(q, cumulative[-1]) * (1 - 1e-12), np.finfo(float).tiny)
    return float(prices[np.searchsorted(cumulative, share)])
