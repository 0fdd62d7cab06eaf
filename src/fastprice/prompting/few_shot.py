"""Few-shot: k priced items of the training set before the item, the same for every item.

They are drawn by seed, one from each of k equal shares of the training prices, so that the model sees what is cheap and
what is dear here, and stand in a drawn order: sorted by price they would teach that the next price is higher.
(Brown et al., "Language Models are Few-Shot Learners", 2020.) Since they begin every prompt, they are computed once.

An example that is the item itself, its near-duplicate, or of its group gives way to another from the same share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from fastprice.data.items import Item
from fastprice.data.splitting import near_duplicates
from fastprice.errors import DataError
from fastprice.prompting.layout import LaidOut, layout_of
from fastprice.prompting.strategy import Asked, priced

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["FewShot", "asked_of", "unlike"]

_SPARE = 4  # candidates for each place


class FewShot:
    """`examples_` after `fit`: for each of the k places, the candidates in the order of preference."""

    def __init__(self, k: int = 4, *, seed: int = 0) -> None:
        self.k, self.seed = k, seed
        self.name = f"few-shot:{k}"

    def fit(self, train: Sequence[Item]) -> Self:
        items = priced(train, self.k, self.name)
        random = np.random.default_rng(self.seed)
        # By content where prices are equal: the order of the rows must not matter.
        ranked = sorted(items, key=lambda item: (item.price, item.text))
        places = []
        for share in np.array_split(np.arange(len(ranked)), self.k):
            chosen = random.choice(share, min(_SPARE, len(share)), replace=False)
            places.append([ranked[index] for index in chosen])
        self.examples_ = [places[index] for index in random.permutation(self.k)]
        return self

    def ask(self, estimator: PriceEstimator, items: Sequence[Item]) -> Asked:
        layout = layout_of(estimator)
        examples = [self._examples(item) for item in items]
        laid_out = [layout.price_prompt(item.text, examples=each) for item, each in zip(items, examples, strict=True)]
        return asked_of(laid_out, sum(map(len, examples)))

    def _examples(self, item: Item) -> list[Item]:
        if not hasattr(self, "examples_"):
            raise DataError(f"{self.name} has no examples yet: call fit(train) first")
        firsts = (next((each for each in place if unlike(item, [each])[0]), None) for place in self.examples_)
        return [example for example in firsts if example is not None]


def unlike(item: Item, candidates: Sequence[Item]) -> list[bool]:
    """Which candidates may be shown beside `item`: none that is the item, its near-duplicate, or of its group."""
    near = near_duplicates(item.text, [candidate.text for candidate in candidates])
    return [
        not alike and (item.group is None or candidate.group != item.group)
        for candidate, alike in zip(candidates, near.tolist(), strict=True)
    ]


def asked_of(laid_out: Sequence[LaidOut], shown: int) -> Asked:
    """One call of the model an item, on prompts for which there were `shown` examples in all."""
    read = np.array([len(each.prompt.ids) for each in laid_out], dtype=np.int64)
    dropped, shortened = sum(each.dropped for each in laid_out), sum(each.shortened for each in laid_out)
    tally = Counter({"examples shown": shown - dropped, "examples dropped": dropped, "examples shortened": shortened})
    return Asked([each.prompt for each in laid_out], read, np.zeros_like(read), tally)
