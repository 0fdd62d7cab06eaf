"""Metrics against plain arithmetic, the coverage of their intervals, and every error."""

from __future__ import annotations

import copy
import json
import math
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprice.errors import ConfigError, DataError
from fastprice.evaluation.metrics import METRICS, Figure, paired_difference, score

prices = st.floats(0.01, 1e5)


def naive(truths: list[float], guesses: list[float]) -> dict[str, float]:
    """The definitions, item by item, without numpy."""
    n = len(truths)
    pairs = list(zip(truths, guesses, strict=True))
    mean = sum(truths) / n
    variation = sum((t - mean) ** 2 for t in truths)
    squared = sum((g - t) ** 2 for t, g in pairs)
    return {
        "mae": sum(abs(g - t) for t, g in pairs) / n,
        "rmse": math.sqrt(squared / n),
        "rmsle": math.sqrt(sum((math.log1p(max(g, 0)) - math.log1p(t)) ** 2 for t, g in pairs) / n),
        "mape": 100 * sum(abs(g - t) / t for t, g in pairs) / n,
        "r2": 1 - squared / variation if variation > 1e-6 else math.nan,
        "hit_rate": 100 * sum(abs(g - t) < 40 or abs(g - t) / t < 0.2 for t, g in pairs) / n,
    }


def test_hand_computed_scores() -> None:
    scores = score([100.0, 300.0, 10.0], [110.0, 200.0, 60.0])
    assert scores.n == 3
    assert scores.mae == pytest.approx(160 / 3)
    assert scores.rmse == pytest.approx(math.sqrt((100 + 10_000 + 2_500) / 3))
    assert scores.mape == pytest.approx(100 * (0.1 + 1 / 3 + 5) / 3)
    assert scores.hit_rate == pytest.approx(100 / 3)  # only the first: $100 and $50 are over $40 and over 20 %
    assert scores.r2 == pytest.approx(1 - 12_600 / variation([100, 300, 10]))


def variation(values: list[float]) -> float:
    return sum((value - sum(values) / len(values)) ** 2 for value in values)


@given(st.lists(st.tuples(prices, st.floats(-1e3, 1e5)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_figures_are_their_definitions(pairs: list[tuple[float, float]]) -> None:
    truths, guesses = map(list, zip(*pairs, strict=True))
    expected = naive(truths, guesses)
    scores = score(truths, guesses, resamples=20)
    for metric in METRICS:
        if metric == "r2" and variation(truths) <= 1e-6 * sum(truths) ** 2:
            continue  # both are ill-conditioned where the truths hardly vary
        assert getattr(scores, metric) == pytest.approx(expected[metric], rel=1e-9, abs=1e-9, nan_ok=True), metric


@pytest.mark.parametrize(
    ("truth", "guess", "hit"),
    [
        (50, 89.99, True),
        (50, 90, False),  # $40 is not under $40, 80 % not under 20 %
        (300, 359.99, True),
        (300, 360, False),  # 20 % is not under 20 %
        (1100, 1320, False),  # 0.2 * 1100 is above 220 in floating point
        (1100, 1319.99, True),
    ],
)
def test_a_hit_is_strictly_within_either_band(truth: float, guess: float, hit: bool) -> None:
    assert (score([truth], [guess]).hit_rate == 100) is hit


def test_perfect_guesses() -> None:
    truths = [1.0, 20.0, 300.0]
    scores = score(truths, truths)
    assert (scores.mae, scores.rmse, scores.rmsle, scores.mape, scores.r2, scores.hit_rate) == (0, 0, 0, 0, 1, 100)
    assert (scores.mae.low, scores.mae.high, scores.r2.low) == (0, 0, 1)


def test_negative_guess_is_zero_dollars_for_rmsle_only() -> None:
    negative, zero = score([10.0], [-5.0]), score([10.0], [0.0])
    assert negative.rmsle == zero.rmsle
    assert (negative.mae, zero.mae) == (15, 10)


@pytest.mark.parametrize("truths", [[9.99], [0.1, 0.1, 0.1], [1e5 + 0.1] * 7])
def test_r2_is_undefined_without_variation(truths: list[float]) -> None:
    scores = score(truths, [value + 1 for value in truths])
    assert math.isnan(scores.r2)
    assert math.isnan(scores.r2.low)
    assert scores.mae.low == pytest.approx(1)
    assert scores.as_dict()["r2"] == {"value": None, "low": None, "high": None}


def test_r2_survives_resamples_without_variation() -> None:
    scores = score([10.0, 20.0, 300.0], [11.0, 22.0, 290.0], resamples=200)  # 1 in 9 resamples is one item thrice
    assert scores.r2.low <= scores.r2 <= scores.r2.high


def test_one_resample_without_variation_gives_r2_no_interval() -> None:
    figures = [score([10.0, 20.0], [11.0, 22.0], resamples=1, seed=seed).r2 for seed in range(8)]
    assert figures == pytest.approx([1 - 5 / 50] * 8)
    assert {math.isnan(figure.low) for figure in figures} == {True, False}  # half the draws are one item twice


def test_r2_keeps_its_digits_where_prices_are_large_and_vary_little() -> None:
    assert score([1e6, 1e6 + 1, 1e6 + 2], [1e6, 1e6 + 1, 1e6 + 3]).r2 == pytest.approx(0.5, rel=1e-9)


def test_same_seed_same_interval_and_another_seed_another() -> None:
    random = np.random.default_rng(1)
    truths = random.lognormal(4, 1, 200)
    guesses = truths * random.lognormal(0, 0.3, 200)
    assert score(truths, guesses).as_dict() == score(list(truths), list(guesses)).as_dict()
    assert score(truths, guesses, seed=1).mae.low != score(truths, guesses).mae.low


def test_the_defaults_are_1000_resamples_from_seed_0() -> None:
    random = np.random.default_rng(1)
    truths, a, b = random.lognormal(4, 1, (3, 50))
    assert score(truths, a).as_dict() == score(truths, a, resamples=1000, seed=0).as_dict()
    gap = paired_difference(truths, a, b)
    for seed, same in ((0, True), (1, False)):
        other = paired_difference(truths, a, b, resamples=1000, seed=seed)
        assert ((gap.low, gap.high) == (other.low, other.high)) is same


def test_interval_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    truths, guesses = random.lognormal(4, 1, 50), random.lognormal(4, 1, 50)
    whole = score(truths, guesses, resamples=101)
    monkeypatch.setattr("fastprice.evaluation.metrics._CHUNK_BYTES", 8 * 50 * 7)
    chunked = score(truths, guesses, resamples=101)
    for metric in METRICS:
        assert getattr(chunked, metric).high == pytest.approx(getattr(whole, metric).high, rel=1e-12)


def test_the_interval_has_the_coverage_of_its_confidence() -> None:
    """300 sets of 100 items with |error| of mean $10: a 90 % interval has the 10 in it in about 90 % of them."""
    random = np.random.default_rng(3)
    covered = 0
    for seed in range(300):
        truths = random.uniform(50, 500, 100)
        figure = score(truths, truths + random.exponential(10, 100), confidence=0.9, resamples=200, seed=seed).mae
        covered += figure.low <= 10 <= figure.high
    assert 0.83 < covered / 300 < 0.94


def test_wider_confidence_wider_interval() -> None:
    truths = np.linspace(10, 500, 60)
    guesses = truths * np.linspace(0.5, 1.5, 60)
    narrow, wide = (score(truths, guesses, confidence=confidence).mae for confidence in (0.5, 0.99))
    assert wide.low < narrow.low < narrow < narrow.high < wide.high


def test_ten_thousand_items_in_little_memory() -> None:
    random = np.random.default_rng(0)
    truths = random.lognormal(4, 1, 10_000)
    tracemalloc.start()
    score(truths, truths * 1.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20


def test_paired_difference_is_the_difference_and_narrower_than_the_pair() -> None:
    random = np.random.default_rng(0)
    truths = random.lognormal(4, 1, 300)
    noise = random.lognormal(0, 0.5, 300)
    better, worse = truths * noise, truths * noise * 1.05
    gap = paired_difference(truths, better, worse)
    a, b = score(truths, better).mae, score(truths, worse).mae
    assert gap == pytest.approx(a - b)
    assert gap.low <= gap <= gap.high
    assert gap.high - gap.low < 0.5 * (a.high - a.low)
    assert paired_difference(truths, better, better).high == 0
    for metric in METRICS:
        assert paired_difference(truths, worse, better, metric) == pytest.approx(
            getattr(score(truths, worse), metric) - getattr(score(truths, better), metric)
        )


def test_figure_is_a_float_with_an_interval() -> None:
    figure = score([10.0, 20.0], [11.0, 25.0]).mae
    assert isinstance(figure, float)
    assert f"{figure:.2f}" == "3.00"
    assert (figure.low, figure.high) == (1, 5)
    for twin in (pickle.loads(pickle.dumps(figure)), copy.deepcopy(figure)):
        assert isinstance(twin, Figure)
        assert (twin, twin.low, twin.high) == (3, 1, 5)


def test_as_dict_is_valid_json() -> None:
    scores = score([10.0, 20.0], [11.0, 25.0])
    read = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert read["mae"] == {"value": 3.0, "low": 1.0, "high": 5.0}
    assert set(read) == {*METRICS, "n"}


@pytest.mark.parametrize(
    ("truths", "guesses", "words"),
    [
        ([], [], "no items"),
        ([1.0, 2.0], [1.0], "2 truths and 1 guesses"),
        ([1.0, 0.0], [1.0, 1.0], r"truths\[1\] is 0.0"),
        ([1.0, -3.0, -4.0], [1.0, 1.0, 1.0], r"truths\[1\] is -3.0 \(and 1 more\)"),
        ([1.0, math.nan], [1.0, 1.0], r"truths\[1\] is nan"),
        ([1.0, None], [1.0, 1.0], r"truths\[1\] is nan"),
        ([1.0, 1.0], [math.inf, 1.0], r"guesses\[0\] is inf"),
        ([1.0, 1.0], [1.0, math.nan], r"guesses\[1\] is nan"),
        ([1.0], [1e200], r"guesses\[0\] is 1e\+200"),
        ([1.0], ["ten dollars"], "guesses are not all numbers"),
        ([[1.0]], [[1.0]], "shape"),
    ],
)
def test_unusable_numbers_are_refused_in_one_line(truths: list[float], guesses: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        score(truths, guesses)
    assert "\n" not in str(caught.value)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="confidence is 95"):
        score([1.0], [1.0], confidence=95)
    with pytest.raises(ConfigError, match="resamples is 0"):
        score([1.0], [1.0], resamples=0)
    with pytest.raises(ConfigError, match="unknown metric 'mea'"):
        paired_difference([1.0], [1.0], [1.0], "mea")
    for a, b, name in (([math.nan], [1.0], "guesses_a"), ([1.0], [math.nan], "guesses_b")):
        with pytest.raises(DataError, match=rf"^{name}\[0\] is nan"):
            paired_difference([1.0], a, b)
