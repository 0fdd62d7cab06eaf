"""`PromptedEstimator`: a model and a strategy, from texts to distributions, estimates and intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastprice.data.estimator_inputs import price_of
from fastprice.data.items import Item
from fastprice.errors import DataError
from fastprice.inference.conformal import Calibration, calibrate
from fastprice.prompting.registry import choose_strategy
from fastprice.prompting.strategy import Strategy, as_items

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator
    from fastprice.inference.price_distribution import PriceDistribution

__all__ = ["Answers", "PromptedEstimator"]

_BATCHES = 4  # of items in work at once: memory does not grow with their number, and a progress bar moves


@dataclass(frozen=True)
class Answers:
    """What asking about N items gave, in their order, and what it took.

    distributions                     p(price | prompt)
    prompt_tokens, generated_tokens   int64 (N,): read and written by the model for each item, over all its calls. The
                                      digits of prices are not counted: their probabilities are read, none is written
    cut                               items whose own text was longer than max_tokens
    tally                             what happened how often ("examples dropped": 3)
    """

    distributions: list[PriceDistribution]
    prompt_tokens: NDArray[np.int64]
    generated_tokens: NDArray[np.int64]
    cut: int
    tally: Counter[str]


class PromptedEstimator:
    """`estimator` (fitted, loaded, or only prepared) asked by `strategy`, which may show it items of `train`.

    `estimator` must give distributions (`gives_distributions_`). A strategy by name is chosen with `seed`. Nothing is
    trained.
    `calibration_` is None until `calibrate`.
    """

    def __init__(
        self, estimator: PriceEstimator, strategy: Strategy | str, train: Sequence[Item] = (), *, seed: int = 0
    ) -> None:
        chosen = choose_strategy(strategy, seed=seed) if isinstance(strategy, str) else strategy
        self.estimator = estimator
        self.strategy = chosen.fit(train)
        self.calibration_: Calibration | None = None
        self._usual = float(np.median([price_of(item) for item in train])) if train else np.nan

    def calibrate(
        self, validation: Sequence[Item], *, on_items: Callable[[int], None] | None = None
    ) -> PromptedEstimator:
        """Learns how wide intervals must be under this strategy, from priced items that nothing else has seen.

        Raises DataError where no item has both a price and a distribution.
        """
        answers = self.ask(validation, on_items=on_items)
        scored = [
            (distribution, price_of(item))
            for item, distribution in zip(validation, answers.distributions, strict=True)
            if not distribution.is_empty
        ]
        ceiling = self.estimator.ceiling_price_
        self.calibration_ = calibrate([each for each, _ in scored], [price for _, price in scored], ceiling=ceiling)
        return self

    def ask(
        self,
        texts: Sequence[str] | Sequence[Item],
        *,
        tolerance: float | None = None,
        on_items: Callable[[int], None] | None = None,
    ) -> Answers:
        """The distributions of texts or items, with their bill; an item's price, if it has one, is never looked at.

        `tolerance` as in `PriceEstimator.distributions`; `on_items` is told how many items are done.
        """
        items = as_items(texts)
        distributions: list[PriceDistribution] = []
        read, written = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        tally: Counter[str] = Counter()
        cut = 0
        step = _BATCHES * self.estimator.batch_size
        for start in range(0, len(items), step):
            asked = self.strategy.ask(self.estimator, items[start : start + step])
            distributions += self.estimator.distributions(asked.prompts, tolerance=tolerance)
            read.append(asked.prompt_tokens)
            written.append(asked.generated_tokens)
            tally.update(asked.tally)
            cut += sum(prompt.cut > 0 for prompt in asked.prompts)
            if on_items:
                on_items(len(distributions))
        return Answers(distributions, np.concatenate(read), np.concatenate(written), cut, tally)

    def predict(self, texts: Sequence[str] | Sequence[Item], *, criterion: str = "mae") -> NDArray[np.float64]:
        """Prices in dollars, float64 (N,), best for `criterion`; see `PriceEstimator.predict`."""
        return self.estimates(self.ask(texts).distributions, criterion)

    def predict_distribution(self, texts: Sequence[str] | Sequence[Item]) -> list[PriceDistribution]:
        """p(price | prompt) within 1e-4 of each exact probability."""
        return self.ask(texts, tolerance=1e-4).distributions

    def predict_interval(self, texts: Sequence[str] | Sequence[Item], coverage: float = 0.9) -> NDArray[np.float64]:
        """(low, high) in dollars, float64 (N, 2), that hold `coverage` of unseen prices.

        Raises DataError before `calibrate`, or when that saw too few items for such a coverage.
        """
        return self.intervals(self.ask(texts).distributions, coverage)

    def estimates(self, distributions: Sequence[PriceDistribution], criterion: str = "mae") -> NDArray[np.float64]:
        """The estimate of each for `criterion`, in dollars; for an empty one the fallback or train's median."""
        prices = self.estimator.estimates(distributions, criterion)
        return np.where(np.isnan(prices), self._usual, prices)

    def intervals(self, distributions: Sequence[PriceDistribution], coverage: float = 0.9) -> NDArray[np.float64]:
        """`predict_interval` for distributions that are known already; the whole range for an empty one."""
        if self.calibration_ is None:
            raise DataError(f"intervals of {self.strategy.name} are not calibrated yet: call calibrate(validation)")
        everything = (1.0, self.estimator.ceiling_price_)
        bounds = [everything if each.is_empty else self.calibration_.interval(each, coverage) for each in distributions]
        return np.array(bounds, dtype=np.float64).reshape(-1, 2)
