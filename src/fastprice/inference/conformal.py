"""Split-conformal calibration: price intervals whose coverage of unseen prices is the one that was requested.

A fine-tuned model may be overconfident or underconfident: its central 90 % interval covers 75 %, or 97 %, of the true
prices. Split conformal prediction corrects that and needs nothing but its intervals (Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World", 2005; with quantiles: Romano, Patterson and Candes, "Conformalized Quantile
Regression", 2019). Each of n items that were not trained on gets a score: how wide the interval has to be to reach the
true price. The interval at coverage c is then as wide as the k-th smallest score, k = ceil((n + 1) c). A new item from
the same source is covered with a probability of at least c (and, without ties, at most c + 1 / (n + 1)) on average over
draws of the n. For one draw, the standard deviation of a coverage of 90 % is 2.1 points with n = 200, 0.9 with
n = 1000.

The score of a price y under a distribution is the coverage of the model's smallest central interval with y in it: 0
at its median, 1 at the end of its prices; beyond the end, 1 and the log of y over that end. So one number an item
serves every coverage, and the intervals of an item are nested in coverage. Other scores were compared (docs/LOG.md).

A score above 1 extends an interval beyond the model's own prices, so intervals are cut at the largest price of the
training and the calibration items. That loses a new item only if its price is above all of them, which has a
probability of at most 1 / (n + 1) for exchangeable items: by so much the guaranteed coverage is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastprice.errors import ConfigError, DataError
from fastprice.inference.price_distribution import PriceDistribution

__all__ = ["Calibration", "calibrate"]

_SLACK = 1e-9  # of probability: an interval whose end is at a score contains it in spite of rounding


@dataclass(frozen=True)
class Calibration:
    """Split-conformal calibration of price intervals, as `PriceEstimator.calibration_` holds it after `fit`.

    Attributes:
        scores: the conformity scores of the calibration items, ascending and at least 0: all that intervals at any
            coverage need.
        highest: the price in dollars at which intervals are cut; None: nowhere.

    Raises DataError for scores that are not finite, below 0 or not ascending, or a `highest` that is not above $0.
    """

    scores: tuple[float, ...]
    highest: float | None = None

    def __post_init__(self) -> None:
        scores = np.asarray(self.scores, dtype=np.float64)
        if not len(scores) or not (np.isfinite(scores).all() and scores[0] >= 0 and (np.diff(scores) >= 0).all()):
            raise DataError("a calibration needs at least one score, all finite, at least 0 and ascending")
        if self.highest is not None and not 0 < self.highest < math.inf:
            raise DataError(f"a calibration's highest price is above $0 and finite, not {self.highest}")

    @property
    def max_coverage(self) -> float:
        """The largest coverage that n calibration items can guarantee: n / (n + 1)."""
        return len(self.scores) / (len(self.scores) + 1)

    def interval(self, distribution: PriceDistribution, coverage: float = 0.9) -> tuple[float, float]:
        """The calibrated interval (low, high) of a distribution, in dollars above 0; both NaN for an empty one.

        Raises ConfigError for an impossible coverage, DataError for one beyond `max_coverage`.
        """
        score = self.score_at(coverage)
        if distribution.is_empty:
            return math.nan, math.nan
        tail = (1 - score) / 2 - _SLACK
        low, high = distribution.quantile(max(tail, 0.0)), distribution.quantile(min(1 - tail, 1.0))
        beyond = math.exp(max(score - 1, 0.0))
        cut = math.inf if self.highest is None else self.highest
        return min(low / beyond, cut), min(high * beyond, cut)

    def score_at(self, coverage: float) -> float:
        """The score that guarantees `coverage`; up to 1, it is the coverage of the model's own interval to take.

        Raises as `interval` does.
        """
        if not 0.0 < coverage < 1.0:
            raise ConfigError(f"coverage is {coverage}: give a share between 0 and 1, such as 0.9")
        rank = math.ceil((len(self.scores) + 1) * coverage - _SLACK)
        if rank > len(self.scores):
            needed = math.ceil(coverage / (1 - coverage) - _SLACK)
            raise DataError(
                f"{len(self.scores)} calibration items cannot guarantee a coverage of {coverage}: give at least "
                f"{needed} validation items, or a coverage of at most {math.floor(1000 * self.max_coverage) / 1000}"
            )
        return self.scores[rank - 1]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back exactly."""
        return {"scores": list(self.scores), "highest": self.highest}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Calibration:
        """The calibration that `as_dict` wrote; DataError for anything else."""
        try:
            highest = saved["highest"]
            return cls(tuple(float(score) for score in saved["scores"]), None if highest is None else float(highest))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is no saved calibration ({error!r}); calibrate again") from error


def calibrate(
    distributions: Sequence[PriceDistribution], truths: ArrayLike, *, ceiling: float | None = None
) -> Calibration:
    """The calibration from N distributions and the true prices of the same items, which were not trained on.

    Args:
        distributions: N distributions, none of them empty.
        truths: N prices in dollars, above 0.
        ceiling: the largest price of the training items, in dollars: intervals are cut there, or at the largest of
            `truths` where that is more. None: they are not cut.

    Raises DataError for no items, lengths that differ, a price that is not above $0, an empty distribution.
    """
    prices = np.asarray(truths, dtype=np.float64)
    if prices.shape != (len(distributions),) or not len(distributions):
        raise DataError(
            f"{len(distributions)} distributions and prices of shape {prices.shape}: give at least one item, and each "
            "of them a price"
        )
    if not (np.isfinite(prices) & (prices > 0)).all():
        raise DataError("a calibration price is not above $0: leave out items without one")
    if empty := sum(distribution.is_empty for distribution in distributions):
        raise DataError(
            f"{empty} calibration items have an empty distribution: leave them out, or train the model more"
        )
    scores = [_score(distribution, price) for distribution, price in zip(distributions, prices.tolist(), strict=True)]
    highest = None if ceiling is None else max(ceiling, float(prices.max()))
    return Calibration(tuple(sorted(scores)), highest)


def _score(distribution: PriceDistribution, price: float) -> float:
    lowest, highest = distribution.quantile(0), distribution.quantile(1)
    if price < lowest:
        return 1 + math.log(lowest / price)
    if price > highest:
        return 1 + math.log(price / highest)
    at_most, below = distribution.cdf(price), distribution.cdf(math.nextafter(price, 0))
    return min(1.0, max(0.0, 1 - 2 * at_most, 2 * below - 1))
