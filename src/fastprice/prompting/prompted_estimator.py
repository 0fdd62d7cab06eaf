"""`PromptedEstimator`: a model and a strategy, from texts to distributions, estimates and intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastprice.data.estimator_inputs import as_items, price_of
from fastprice.data.items import Item
from fastprice.errors import DataError
from fastprice.inference.conformal import Calibration, calibrate
from fastprice.prompting.registry import make_strategy
from fastprice.prompting.strategy import Strategy

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator
    from fastprice.inference.price_distribution import PriceDistribution

__all__ = ["PromptedEstimator", "QueryResult"]

_BATCHES_AT_ONCE = 4  # of prompts: bounds the memory and gives a progress bar steps


@dataclass(frozen=True)
class QueryResult:
    """The price distributions of N items under a strategy, in their order, and the tokens that they cost.

    Attributes:
        distributions: p(price | prompt) of each item.
        prompt_tokens: int64 (N,): tokens that the model read for each item, over all its calls.
        generated_tokens: int64 (N,): tokens that it generated for each item. The digits of prices are not among them:
            their probabilities are computed, none is generated.
        texts_cut: number of items whose text was longer than max_tokens.
        tally: number of events by name ("examples dropped": 3).
    """

    distributions: list[PriceDistribution]
    prompt_tokens: NDArray[np.int64]
    generated_tokens: NDArray[np.int64]
    texts_cut: int
    tally: Counter[str]


class PromptedEstimator:
    """Price estimates by `estimator` (fitted, loaded, or only prepared) with the prompts of `strategy`; no training.

    Args:
        estimator: one that gives distributions (`gives_distributions_`).
        strategy: its name, as for `make_strategy`, or an object.
        train: priced items that the strategy may show as examples.
        seed: for a strategy by name.

    `calibration_` is None until `calibrate`. Raises ConfigError for an unknown strategy, DataError for too few items.
    """

    def __init__(
        self, estimator: PriceEstimator, strategy: Strategy | str, train: Sequence[Item] = (), *, seed: int = 0
    ) -> None:
        chosen = make_strategy(strategy, seed=seed) if isinstance(strategy, str) else strategy
        self.estimator = estimator
        self.strategy = chosen.fit(train)
        self.calibration_: Calibration | None = None
        self._median_price = float(np.median([price_of(item) for item in train])) if train else np.nan

    def calibrate(
        self, validation: Sequence[Item], *, on_items: Callable[[int], None] | None = None
    ) -> PromptedEstimator:
        """Split-conformal calibration of intervals for this strategy, on priced items that were not used otherwise.

        `on_items` is called with the number of finished items. Raises DataError for an item without a price, or when
        no item has a distribution.
        """
        result = self.query(validation, on_items=on_items)
        scored = [
            (distribution, price_of(item))
            for item, distribution in zip(validation, result.distributions, strict=True)
            if not distribution.is_empty
        ]
        ceiling = self.estimator.ceiling_price_
        self.calibration_ = calibrate([each for each, _ in scored], [price for _, price in scored], ceiling=ceiling)
        return self

    def query(
        self,
        texts: Sequence[str] | Sequence[Item],
        *,
        tolerance: float | None = None,
        on_items: Callable[[int], None] | None = None,
    ) -> QueryResult:
        """The price distributions of texts or items, with the tokens they cost; prices of items are not read.

        `tolerance` as in `PriceEstimator.distributions`; `on_items` is called with the number of finished items.
        Raises ConfigError when a prompt cannot fit the model's context window.
        """
        items = as_items(texts)
        distributions: list[PriceDistribution] = []
        prompt_tokens, generated_tokens = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        tally: Counter[str] = Counter()
        texts_cut = 0
        step = _BATCHES_AT_ONCE * self.estimator.batch_size
        for start in range(0, len(items), step):
            batch = self.strategy.build_prompts(self.estimator, items[start : start + step])
            distributions += self.estimator.distributions(batch.prompts, tolerance=tolerance)
            prompt_tokens.append(batch.prompt_tokens)
            generated_tokens.append(batch.generated_tokens)
            tally.update(batch.tally)
            texts_cut += sum(prompt.cut > 0 for prompt in batch.prompts)
            if on_items:
                on_items(len(distributions))
        return QueryResult(
            distributions, np.concatenate(prompt_tokens), np.concatenate(generated_tokens), texts_cut, tally
        )

    def predict(self, texts: Sequence[str] | Sequence[Item], *, criterion: str = "mae") -> NDArray[np.float64]:
        """Prices in dollars, float64 (N,), best for `criterion`; see `PriceEstimator.predict`."""
        return self.estimates(self.query(texts).distributions, criterion)

    def predict_distribution(self, texts: Sequence[str] | Sequence[Item]) -> list[PriceDistribution]:
        """p(price | prompt) of each text, within about 1e-4 of each exact probability."""
        from fastprice.inference.price_decoder import DISTRIBUTION_TOLERANCE

        return self.query(texts, tolerance=DISTRIBUTION_TOLERANCE).distributions

    def predict_interval(self, texts: Sequence[str] | Sequence[Item], coverage: float = 0.9) -> NDArray[np.float64]:
        """Calibrated intervals (low, high) in dollars, float64 (N, 2), with `coverage` of unseen prices.

        Raises DataError before `calibrate`, or when that saw too few items for such a coverage.
        """
        return self.intervals(self.query(texts).distributions, coverage)

    def estimates(self, distributions: Sequence[PriceDistribution], criterion: str = "mae") -> NDArray[np.float64]:
        """The estimate of each for `criterion`, dollars, float64 (N,).

        An empty distribution gets the estimator's fallback price, or the median price of the training items.
        """
        prices = self.estimator.estimates(distributions, criterion)
        return np.where(np.isnan(prices), self._median_price, prices)

    def intervals(self, distributions: Sequence[PriceDistribution], coverage: float = 0.9) -> NDArray[np.float64]:
        """`predict_interval` for distributions that are known; an empty one gets the whole range of prices."""
        if self.calibration_ is None:
            raise DataError(f"intervals of {self.strategy.name} are not calibrated yet: call calibrate(validation)")
        whole_range = (1.0, self.estimator.ceiling_price_)
        bounds = [
            whole_range if each.is_empty else self.calibration_.interval(each, coverage) for each in distributions
        ]
        return np.array(bounds, dtype=np.float64).reshape(-1, 2)
