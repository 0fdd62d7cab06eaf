"""A nano model that was trained on something, once for all tests that need one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.two_prices import two_price_items

if TYPE_CHECKING:
    from fastprice import PriceEstimator
    from fastprice.training.callbacks import TrainingEvent


@pytest.fixture(scope="session")
def fitted() -> PriceEstimator:
    """Trained on the two prices of tests/two_prices.py; `events` are the events of its training."""
    from fastprice import PriceEstimator

    events: list[TrainingEvent] = []
    estimator = PriceEstimator(
        epochs=6.0, max_tokens=96, pack_tokens=256, evaluations=2, validation_items=24, learning_rate=5e-3
    )
    estimator.fit(two_price_items(200), two_price_items(24), on_event=events.append)
    estimator.events = events
    return estimator
