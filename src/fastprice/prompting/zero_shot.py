"""Zero-shot: the question and the item's text, as in training. Every other strategy has to be better than this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from fastprice.data.items import Item
from fastprice.prompting.strategy import PromptBatch

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["ZeroShot"]


class ZeroShot:
    """The prompts of `PriceEstimator.predict`."""

    name = "zero-shot"

    def fit(self, train: Sequence[Item]) -> Self:
        return self

    def build_prompts(self, estimator: PriceEstimator, items: Sequence[Item]) -> PromptBatch:
        prompts = estimator.prompts(items)
        lengths = np.array([len(prompt.ids) for prompt in prompts], dtype=np.int64)
        return PromptBatch(prompts, lengths, np.zeros_like(lengths))
