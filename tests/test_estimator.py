"""What `PriceEstimator.fit` derives from its items and settings, on a tiny model in fp32."""

from __future__ import annotations

import numpy as np
import pytest

from fastprice import PriceEstimator
from fastprice.data.synthetic import make_synthetic_items
from fastprice.inference.conformal import calibrate

TRAIN, VALIDATION = make_synthetic_items(10, seed=1), make_synthetic_items(7, seed=2)


@pytest.fixture(scope="module")
def estimator(tiny_base: str) -> PriceEstimator:
    settings = {"max_tokens": 64, "pack_tokens": 256, "evaluations": 1}
    return PriceEstimator(tiny_base, method="lora", **settings).fit(TRAIN, VALIDATION)


def test_intervals_are_calibrated_on_the_validation_items(estimator: PriceEstimator) -> None:
    distributions = estimator.distributions(estimator.prompts(VALIDATION))
    dearest = max(item.price for item in TRAIN)
    expected = calibrate(distributions, [item.price for item in VALIDATION], ceiling=dearest)
    assert estimator.calibration_ is not None
    assert len(estimator.calibration_.scores) == len(VALIDATION) != len(TRAIN)
    assert estimator.calibration_.scores == pytest.approx(expected.scores)
    assert estimator.calibration_.highest == expected.highest


def test_without_validation_items_nothing_is_calibrated(tiny_base: str) -> None:
    estimator = PriceEstimator(tiny_base, method="lora", max_tokens=64, pack_tokens=256).fit(TRAIN)
    assert estimator.calibration_ is None
    assert estimator.training_.best_step is None


def test_fallback_and_ceiling_are_those_of_the_training_prices(estimator: PriceEstimator) -> None:
    prices = [item.price for item in TRAIN]
    assert estimator.fallback_price_ == np.median(prices) != np.mean(prices)
    assert estimator.ceiling_price_ == max(prices)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [({}, 32), ({"rank": 3}, 6), ({"rank": 3, "alpha": 5.0}, 5)],
    ids=["default", "rank", "given"],
)
def test_alpha_is_twice_the_rank_unless_given(tiny_base: str, settings: dict[str, float], alpha: float) -> None:
    adapter = PriceEstimator(tiny_base, method="lora", **settings).prepare().model.peft_config["default"]
    assert adapter.lora_alpha == alpha
    assert adapter.r == settings.get("rank", 16)
