"""The weights of the best evaluation are restored, not the last ones: by validation errors of 10, 5 and 20 dollars.

Fixtures that train well have their best evaluation at the end, where restoring the best step changes nothing. So the
errors are fixed here, while the model goes on training at a rate that changes its prices between evaluations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastprice import PriceEstimator
from fastprice.data.synthetic import make_synthetic_items

ERRORS = (10.0, 5.0, 20.0)
PROBES = make_synthetic_items(3, seed=9)


def probabilities(estimator: PriceEstimator) -> np.ndarray:
    """p(price | text, a price was given) of each probe."""
    masses = np.stack([each.probabilities for each in estimator.predict_distribution(PROBES)])
    return masses / masses.sum(1, keepdims=True)


@pytest.mark.parametrize("output", ["text", "head"])  # "head": the adapter's weights and, beside them, the head's
def test_the_weights_of_the_smallest_error_are_restored(
    tiny_base: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = PriceEstimator(
        tiny_base, method="lora", rank=4, output=output, max_tokens=64, pack_tokens=128, epochs=1.0, learning_rate=2e-2,
        evaluations=len(ERRORS),
    )  # fmt: skip
    seen: list[np.ndarray] = []

    def predict(items: Any) -> np.ndarray:
        seen.append(probabilities(estimator))
        return np.array([item.price for item in items]) + ERRORS[len(seen) - 1]

    monkeypatch.setattr(estimator, "predict", predict)
    estimator.fit(make_synthetic_items(12, seed=1), make_synthetic_items(12, seed=2))

    events = [event for event in estimator.training_.events if event.eval_mae is not None]
    assert [event.eval_mae for event in events] == pytest.approx(ERRORS)
    assert estimator.training_.best_mae == pytest.approx(5.0)
    assert estimator.training_.best_step == events[1].step
    kept = probabilities(estimator)
    for other in (seen[0], seen[2]):
        assert np.abs(other - seen[1]).max() > 1e-3, "the evaluations cannot be told apart"
    np.testing.assert_allclose(kept, seen[1], atol=1e-6)
