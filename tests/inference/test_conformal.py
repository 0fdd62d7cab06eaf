"""Calibrated intervals have the coverage requested, also for over- and underconfident models, at every coverage."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastprice.errors import ConfigError, DataError
from fastprice.inference.conformal import Calibration, calibrate
from fastprice.inference.price_distribution import PriceDistribution

DOLLARS = np.arange(1.0, 1000.0)


def draw_items(
    seed: int, n: int, claimed: float, shift: float = 0.0
) -> tuple[list[PriceDistribution], NDArray[np.float64]]:
    """Items whose log price has a spread of 0.3 to 0.6 that the model claims to be `claimed` times that."""
    random = np.random.default_rng(seed)
    centers, spreads = random.uniform(3.5, 5.5, n), random.uniform(0.3, 0.6, n)
    truths = np.exp(centers + shift + spreads * random.standard_normal(n)).round(2)
    exponents = -0.5 * ((np.log(DOLLARS) - centers[:, None]) / (claimed * spreads[:, None])) ** 2
    weights = np.exp(exponents) / DOLLARS
    return [PriceDistribution(DOLLARS, row / row.sum()) for row in weights], np.maximum(truths, 0.01)


def share_inside(
    calibration: Calibration, items: tuple[list[PriceDistribution], NDArray[np.float64]], c: float
) -> float:
    distributions, truths = items
    bounds = np.array([calibration.interval(distribution, c) for distribution in distributions])
    return float(((bounds[:, 0] <= truths) & (truths <= bounds[:, 1])).mean())


@pytest.mark.parametrize(("claimed", "shift"), [(0.4, 0.0), (2.0, 0.0), (0.7, 0.3)])
def test_intervals_have_the_coverage_requested_where_the_model_does_not(claimed: float, shift: float) -> None:
    unseen = draw_items(99, 1500, claimed, shift)
    raw = np.array([distribution.interval(0.9) for distribution in unseen[0]])
    assert abs(((raw[:, 0] <= unseen[1]) & (unseen[1] <= raw[:, 1])).mean() - 0.9) > 0.05
    for coverage in (0.5, 0.8, 0.9, 0.95):
        calibrations = [calibrate(*draw_items(seed, 400, claimed, shift)) for seed in range(4)]
        inside = np.mean([share_inside(calibration, unseen, coverage) for calibration in calibrations])
        # Four times the standard deviation of 4 x 400 calibration items and of 1500 items to count on.
        allowed = 4 * math.sqrt(coverage * (1 - coverage) * (1 / 1600 + 1 / 1500))
        assert abs(inside - coverage) < allowed + 0.005, coverage


def test_a_better_model_gets_narrower_intervals() -> None:
    knows, truths = draw_items(1, 300, 0.5)
    flat = [PriceDistribution(DOLLARS, np.full(999, 1 / 999))] * 300
    widths = [
        np.mean([np.log(high / low) for low, high in (calibration.interval(one, 0.9) for one in distributions)])
        for distributions, calibration in ((knows, calibrate(knows, truths)), (flat, calibrate(flat, truths)))
    ]
    assert widths[0] < 0.7 * widths[1]


@st.composite
def small_items(draw: st.DrawFn) -> tuple[list[PriceDistribution], list[float]]:
    n = draw(st.integers(1, 25))
    distributions = []
    for _ in range(n):
        prices = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=5)))
        weights = np.array(draw(st.lists(st.integers(1, 9), min_size=len(prices), max_size=len(prices))), float)
        distributions.append(PriceDistribution(np.array(prices, float), weights / weights.sum()))
    return distributions, draw(st.lists(st.floats(0.5, 90.0), min_size=n, max_size=n))


@settings(deadline=None)
@given(small_items(), st.floats(0.02, 0.98))
def test_at_least_rank_many_calibration_items_lie_inside(
    items: tuple[list[PriceDistribution], list[float]], coverage: float
) -> None:
    distributions, truths = items
    calibration = calibrate(distributions, truths)
    rank = math.ceil((len(truths) + 1) * coverage - 1e-9)
    if rank > len(truths):
        with pytest.raises(DataError, match="validation items"):
            calibration.interval(distributions[0], coverage)
        return
    bounds = [calibration.interval(distribution, coverage) for distribution in distributions]
    assert (
        sum(low * (1 - 1e-9) <= y <= high * (1 + 1e-9) for (low, high), y in zip(bounds, truths, strict=True)) >= rank
    )


@settings(deadline=None)
@given(small_items())
def test_intervals_are_nested_in_coverage_and_contain_the_median(
    items: tuple[list[PriceDistribution], list[float]],
) -> None:
    calibration = calibrate(*items)
    coverages = [c for c in np.linspace(0.05, 0.95, 10) if c <= calibration.max_coverage - 1e-6]
    for distribution in items[0]:
        bounds = np.array([calibration.interval(distribution, c) for c in coverages]).reshape(-1, 2)
        assert (np.diff(bounds[:, 0]) <= 0).all()
        assert (np.diff(bounds[:, 1]) >= 0).all()
        assert (bounds[:, 0] <= distribution.median()).all()
        assert (bounds[:, 1] >= distribution.median()).all()
        assert (bounds[:, 0] > 0).all()


def test_a_calibration_is_the_same_after_saving() -> None:
    for ceiling in (None, 700.0):
        calibration = calibrate(*draw_items(3, 30, 0.5), ceiling=ceiling)
        assert Calibration.from_dict(json.loads(json.dumps(calibration.as_dict()))) == calibration


def test_too_few_items_say_how_many_are_needed() -> None:
    calibration = calibrate(*draw_items(3, 18, 0.5))
    distribution = draw_items(4, 1, 0.5)[0][0]
    with pytest.raises(DataError, match=r"18 calibration items .* at least 19 .* at most 0\.947"):
        calibration.interval(distribution, 0.95)
    low, high = calibration.interval(distribution, 0.94)
    assert 0 < low < high


def test_intervals_extend_beyond_the_prices_of_a_model() -> None:
    one = PriceDistribution(np.array([100.0]), np.array([1.0]))
    calibration = calibrate([one] * 9, [50.0] * 4 + [100.0] + [300.0] * 4)
    low, high = calibration.interval(one, 0.9)
    assert (low, high) == (pytest.approx(100 / 3), pytest.approx(300))


def test_intervals_are_cut_at_the_largest_known_price() -> None:
    one = PriceDistribution(np.array([100.0]), np.array([1.0]))
    truths = [50.0] * 4 + [100.0] + [300.0] * 4
    assert calibrate([one] * 9, [20.0, *truths[1:]], ceiling=250.0).interval(one, 0.9)[1] == 300.0
    low, high = calibrate([one] * 9, [20.0] + [50.0] * 8, ceiling=250.0).interval(one, 0.9)
    assert (low, high) == (pytest.approx(20.0), 250.0)
    dearer = PriceDistribution(np.array([400.0]), np.array([1.0]))
    assert calibrate([one] * 9, truths, ceiling=250.0).interval(dearer, 0.5) == (pytest.approx(200.0), 300.0)


def test_an_empty_distribution_has_no_interval_and_is_refused_for_calibration() -> None:
    empty = PriceDistribution(np.empty(0), np.empty(0))
    assert np.isnan(calibrate(*draw_items(3, 30, 0.5)).interval(empty)).all()
    with pytest.raises(DataError, match="1 calibration items"):
        calibrate([empty], [10.0])


@pytest.mark.parametrize("truths", [[], [1.0, 2.0], [0.0], [math.nan], [-3.0]])
def test_unusable_prices_are_refused(truths: list[float]) -> None:
    with pytest.raises(DataError):
        calibrate(draw_items(3, 1, 0.5)[0], truths)


@pytest.mark.parametrize(
    "saved",
    [
        *({"scores": scores, "highest": None} for scores in (None, [], [2, 1], ["x"])),
        *({"scores": [0.5], "highest": highest} for highest in (0.0, math.inf, math.nan, "x")),
        {},
        {"scores": [0.5]},
        [],
    ],
)
def test_a_damaged_calibration_is_refused(saved: object) -> None:
    with pytest.raises(DataError):
        Calibration.from_dict(saved)  # type: ignore[arg-type]


@pytest.mark.parametrize("coverage", [0.0, 1.0, -1.0, math.nan])
def test_impossible_coverage_is_refused(coverage: float) -> None:
    with pytest.raises(ConfigError, match="coverage"):
        Calibration((0.5,)).score_at(coverage)
