"""The interface of a prompting strategy: priced items in, prompts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fastprice.data.items import Item
from fastprice.prompts.template import Prompt

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["PromptBatch", "Strategy"]


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of N items, and the tokens that they cost.

    Attributes:
        prompts: in the order of the items; the model's next token is the first of the price.
        prompt_tokens: int64 (N,): tokens that the model reads for each item, over all its calls, the last included.
        generated_tokens: int64 (N,): tokens that the model generates for each item before the price.
        tally: number of events by name ("examples dropped": 3), for reports.
    """

    prompts: list[Prompt]
    prompt_tokens: NDArray[np.int64]
    generated_tokens: NDArray[np.int64]
    tally: Counter[str] = field(default_factory=Counter)


class Strategy(Protocol):
    """A way to build prompts for a model that is not trained for it."""

    name: str  # as `make_strategy` reads it: "few-shot:4"

    def fit(self, train: Sequence[Item]) -> Self:
        """Stores the priced items that prompts may contain; no weight changes. Raises DataError for too few."""

    def build_prompts(self, estimator: PriceEstimator, items: Sequence[Item]) -> PromptBatch:
        """The prompts of `items`; raises ConfigError when they cannot fit the model's context window."""
