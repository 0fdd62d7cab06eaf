"""What a strategy is, and what it hands over to the decoding that all share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fastprice.data.estimator_inputs import price_of
from fastprice.data.items import Item
from fastprice.errors import DataError
from fastprice.prompts.template import Prompt

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["Asked", "Strategy", "as_items", "priced"]


@dataclass(frozen=True)
class Asked:
    """The prompts of N items, each ready for its price, and what it took to write them.

    prompts           in the order of the items; the model's next token is the price's first
    prompt_tokens     int64 (N,): tokens that the model reads for each item, over all its calls, the last included
    generated_tokens  int64 (N,): tokens that it wrote before it is asked for the price
    tally             what happened how often ("examples dropped": 3), for people
    """

    prompts: list[Prompt]
    prompt_tokens: NDArray[np.int64]
    generated_tokens: NDArray[np.int64]
    tally: Counter[str] = field(default_factory=Counter)


class Strategy(Protocol):
    """A way to ask a model for prices without training it."""

    name: str  # as `choose_strategy` reads it: "few-shot:4"

    def fit(self, train: Sequence[Item]) -> Self:
        """Takes the priced items that it may show the model; no weight changes. DataError where they are too few."""

    def ask(self, estimator: PriceEstimator, items: Sequence[Item]) -> Asked:
        """The prompts of `items`; ConfigError when they cannot fit the model's context window."""


def as_items(texts: Sequence[str] | Sequence[Item]) -> list[Item]:
    """Texts as items without price or group; DataError for one string in place of a list."""
    if isinstance(texts, str):
        raise DataError("give a list of texts, not one string: write [text]")
    return [text if isinstance(text, Item) else Item(str(text)) for text in texts]


def priced(train: Sequence[Item], least: int, name: str) -> list[Item]:
    """`train` as a list, of at least `least` items, each with a price; DataError says what is missing."""
    if len(train) < least:
        raise DataError(
            f"{name} needs {least} or more priced items to show the model, and was given {len(train)}: "
            "give it training items"
        )
    for item in train:
        price_of(item)
    return list(train)
