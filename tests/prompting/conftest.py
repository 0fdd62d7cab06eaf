"""One prepared nano model and one small split for all tests here."""

from __future__ import annotations

import pytest

from fastprice import PriceEstimator, split_items
from fastprice.data.splitting import Split
from fastprice.data.synthetic import make_synthetic_items


@pytest.fixture(scope="session")
def nano() -> PriceEstimator:
    return PriceEstimator(base="nano", method="lora", batch_size=8).prepare()


@pytest.fixture(scope="session")
def split() -> Split:
    return split_items(make_synthetic_items(90, seed=5))
