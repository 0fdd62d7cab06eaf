"""Runs that must have the same losses: with the kernels under the model and without, in packs and accumulated."""

from __future__ import annotations

import numpy as np
import pytest

from fastprice import PriceEstimator
from fastprice.data.synthetic import make_synthetic_items


def losses(**settings: object) -> list[float]:
    options = {"epochs": 2.0, "max_tokens": 96, "pack_tokens": 512, "evaluations": 0, **settings}
    estimator = PriceEstimator(**options).fit(make_synthetic_items(80, seed=2))
    return [event.loss for event in estimator.training_.events if event.loss is not None]


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_kernels_on_and_off_train_alike(method: str) -> None:
    on, off = losses(method=method, kernels="on"), losses(method=method, kernels="off")
    assert len(on) == len(off) > 10
    np.testing.assert_allclose(on, off, rtol=2e-4)


def test_gradient_accumulation_weighs_every_label_alike() -> None:
    """Two packs a step, by our loss head and by TRL's: both divide by the labels of the whole step."""
    on, off = losses(kernels="on", gradient_accumulation=2), losses(kernels="off", gradient_accumulation=2)
    np.testing.assert_allclose(on, off, rtol=2e-4)
