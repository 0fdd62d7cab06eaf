"""`PriceDistribution`: each summary is the best estimate for its criterion, compared with brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastprice.errors import ConfigError, DataError
from fastprice.inference.price_distribution import CRITERIA, PriceDistribution


@st.composite
def distributions(draw: st.DrawFn) -> PriceDistribution:
    prices = sorted(draw(st.sets(st.integers(1, 999), min_size=1, max_size=12)))
    weights = np.array(draw(st.lists(st.floats(1e-6, 1.0), min_size=len(prices), max_size=len(prices))))
    found = draw(st.sampled_from([1e-300, 1e-9, 0.5, 1.0]))
    return PriceDistribution(np.array(prices, float), weights / weights.sum() * found)


def expected(distribution: PriceDistribution, costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected cost of each estimate; costs (estimates, K)."""
    weights = distribution.probabilities / distribution.probabilities.max()
    return costs @ (weights / weights.sum())


def hits(estimates: NDArray[np.float64], prices: NDArray[np.float64]) -> NDArray[np.bool_]:
    error = np.abs(estimates[:, None] - prices)
    return (error < 40) | (5 * error < prices)


GRID = np.arange(0.5, 1300, 0.5)


@settings(max_examples=60, deadline=None)
@given(distributions())
def test_each_estimate_minimizes_its_criterion(distribution: PriceDistribution) -> None:
    prices = distribution.prices
    costs = {
        "mae": lambda g: np.abs(g[:, None] - prices),
        "mse": lambda g: (g[:, None] - prices) ** 2,
        "rmsle": lambda g: (np.log1p(g)[:, None] - np.log1p(prices)) ** 2,
        "mape": lambda g: np.abs(g[:, None] - prices) / prices,
        "hits": lambda g: 1.0 - hits(g, prices),
    }
    assert set(costs) == set(CRITERIA)
    for name, cost in costs.items():
        ours = expected(distribution, cost(np.array([distribution.estimate(name)])))[0]
        best = expected(distribution, cost(GRID)).min()
        assert ours <= best + 1e-9 * (1 + best), name


@settings(deadline=None)
@given(distributions(), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_quantiles_rise_and_invert_the_cdf(distribution: PriceDistribution, shares: list[float]) -> None:
    quantiles = [distribution.quantile(q) for q in sorted(shares)]
    assert quantiles == sorted(quantiles)
    for q, price in zip(sorted(shares), quantiles, strict=True):
        assert distribution.cdf(price) >= q - 1e-9
        assert distribution.cdf(np.nextafter(price, 0)) <= q + 1e-9


@settings(deadline=None)
@given(distributions(), st.floats(0.01, 0.99))
def test_the_central_interval_has_its_coverage(distribution: PriceDistribution, coverage: float) -> None:
    low, high = distribution.interval(coverage)
    assert low <= distribution.median() <= high
    assert distribution.cdf(high) - distribution.cdf(np.nextafter(low, 0)) >= coverage - 1e-9


def test_summaries_are_of_the_mass_found() -> None:
    half = PriceDistribution(np.array([10.0, 20.0, 40.0]), np.array([0.1, 0.3, 0.1]))
    assert half.missing_mass == pytest.approx(0.5)
    assert (half.median(), half.mean(), half.cdf(9), half.cdf(20)) == (
        20.0,
        pytest.approx(22.0),
        0.0,
        pytest.approx(0.8),
    )
    assert half.log_mean() == pytest.approx((11 * 21**3 * 41) ** 0.2 - 1)
    assert half.quantile(0) == 10.0
    assert half.quantile(1) == 40.0


def test_no_quantile_is_a_price_without_mass() -> None:
    only = PriceDistribution(np.array([1.0, 50.0, 999.0]), np.array([0.0, 0.2, 0.0]))
    assert [only.quantile(q) for q in (0.0, 0.5, 1.0)] == [50.0, 50.0, 50.0]


@pytest.mark.parametrize("prices", [[], [5.0, 7.0]])
def test_every_summary_of_an_empty_distribution_is_nan(prices: list[float]) -> None:
    empty = PriceDistribution(np.array(prices), np.zeros(len(prices)))
    assert empty.is_empty
    assert empty.missing_mass == 1.0
    assert all(np.isnan(empty.estimate(criterion)) for criterion in CRITERIA)
    assert np.isnan([empty.quantile(0.3), *empty.interval(0.9), empty.cdf(10)]).all()


def test_the_best_hit_is_in_the_window_with_more_mass() -> None:
    # A window of $40 holds 100 and 170 together from 130 to 140; the mean and the median of all three lie elsewhere.
    distribution = PriceDistribution(np.array([100.0, 170.0, 900.0]), np.array([0.3, 0.3, 0.4]))
    assert 130 < distribution.best_hit() < 140


def test_of_equally_good_hits_the_one_nearest_to_the_median_is_taken() -> None:
    distribution = PriceDistribution(np.array([100.0, 500.0, 900.0]), np.full(3, 0.25))
    assert distribution.best_hit() == 500.0


def test_the_median_is_the_default_estimate() -> None:
    distribution = PriceDistribution(np.array([1.0, 2.0, 9.0]), np.array([0.2, 0.5, 0.3]))
    assert distribution.estimate() == distribution.median() == 2.0


def test_distributions_cannot_be_changed() -> None:
    prices = np.array([1.0, 2.0])
    distribution = PriceDistribution(prices, np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="read-only"):
        distribution.prices[0] = 3.0
    prices[0] = 0.5  # the caller's own array stays writable


@pytest.mark.parametrize(
    ("prices", "probabilities", "says"),
    [
        ([2.0, 1.0], [0.5, 0.5], "ascending"),
        ([0.0, 1.0], [0.5, 0.5], "above"),
        ([1.0, np.inf], [0.5, 0.5], "finite"),
        ([1.0, np.nan], [0.5, 0.5], "ascending"),
        ([1.0, 2.0], [0.9, 0.5], "at most 1"),
        ([1.0, 2.0], [-0.1, 0.5], "at least 0"),
        ([1.0, 2.0], [np.nan, 0.5], "at least 0"),
        ([1.0, 2.0], [0.5], "one probability"),
    ],
)
def test_arrays_that_are_no_distribution_are_refused(
    prices: list[float], probabilities: list[float], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        PriceDistribution(np.array(prices), np.array(probabilities))


def test_impossible_arguments_are_refused() -> None:
    distribution = PriceDistribution(np.array([1.0]), np.array([1.0]))
    with pytest.raises(ConfigError, match="did you mean 'rmsle'"):
        distribution.estimate("rmsl")
    with pytest.raises(ConfigError, match="coverage is 1"):
        distribution.interval(1)
    with pytest.raises(ConfigError, match=r"share is -0\.1"):
        distribution.quantile(-0.1)


def test_it_is_shown_in_one_line() -> None:
    prices = np.arange(1.0, 1000.0)
    distribution = PriceDistribution(prices, np.full(999, 0.75 / 999))
    assert repr([distribution]) == "[PriceDistribution(999 prices, $1 to $999, median=$500, missing_mass=0.25)]"
    assert repr(PriceDistribution(np.empty(0), np.empty(0))) == "PriceDistribution(no price, missing_mass=1)"
