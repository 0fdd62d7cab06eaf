"""Few-shot: k priced training items as examples, the same for every item.

They are drawn by seed, one from each of k equal shares of the training prices, so that the prompt shows the range of
prices, and are in random order: sorted by price they would suggest that the next price is higher. (Brown et al.,
"Language Models are Few-Shot Learners", 2020.) Since every prompt begins with them, they are computed once.

An example that is the item itself, its near-duplicate, or of its group is replaced by another from the same share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from fastprice.data.items import Item
from fastprice.errors import DataError
from fastprice.prompting.examples import allowed_examples, check_priced, prompts_with_examples
from fastprice.prompting.prompt_builder import PromptBuilder
from fastprice.prompting.strategy import PromptBatch

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["FewShot"]

_CANDIDATES = 4  # for each example


class FewShot:
    """k examples drawn by `seed`; after `fit`, `examples_` has the candidates for each, in order of preference."""

    def __init__(self, k: int = 4, *, seed: int = 0) -> None:
        self.k, self.seed = k, seed
        self.name = f"few-shot:{k}"

    def fit(self, train: Sequence[Item]) -> Self:
        items = check_priced(train, self.k, self.name)
        rng = np.random.default_rng(self.seed)
        # By text where prices are equal: the order of the rows must not matter.
        ranked = sorted(items, key=lambda item: (item.price, item.text))
        candidates = []
        for share in np.array_split(np.arange(len(ranked)), self.k):
            drawn = rng.choice(share, min(_CANDIDATES, len(share)), replace=False)
            candidates.append([ranked[index] for index in drawn])
        self.examples_ = [candidates[index] for index in rng.permutation(self.k)]
        return self

    def build_prompts(self, estimator: PriceEstimator, items: Sequence[Item]) -> PromptBatch:
        examples = [self._examples(item) for item in items]
        return prompts_with_examples(PromptBuilder.for_estimator(estimator), items, examples)

    def _examples(self, item: Item) -> list[Item]:
        if not hasattr(self, "examples_"):
            raise DataError(f"{self.name} has no examples yet: call fit(train) first")
        chosen = (
            next((each for each in candidates if allowed_examples(item, [each])[0]), None)
            for candidates in self.examples_
        )
        return [example for example in chosen if example is not None]
