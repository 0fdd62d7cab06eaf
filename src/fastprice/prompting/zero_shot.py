"""Zero-shot: the question and the item's text, as in training. Every other strategy has to beat this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from fastprice.data.items import Item
from fastprice.prompting.strategy import Asked

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["ZeroShot"]


class ZeroShot:
    """What `PriceEstimator.predict` does."""

    name = "zero-shot"

    def fit(self, train: Sequence[Item]) -> Self:
        return self

    def ask(self, estimator: PriceEstimator, items: Sequence[Item]) -> Asked:
        prompts = estimator.prompts(items)
        read = np.array([len(prompt.ids) for prompt in prompts], dtype=np.int64)
        return Asked(prompts, read, np.zeros_like(read))
