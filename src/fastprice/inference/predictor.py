"""Prediction: prices, distributions and intervals from a model that is there; `PriceEstimator` makes the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprice.data.inputs import price_of, text_of
from fastprice.data.items import Item
from fastprice.errors import ConfigError, DataError, NotFittedError
from fastprice.prompts.template import FORMS, Form, Prompt, encode_prompt

if TYPE_CHECKING:
    from fastprice.inference.conformal import Calibration
    from fastprice.inference.explain import Explanation
    from fastprice.inference.price_decoder import PriceDecoder
    from fastprice.inference.price_distribution import PriceDistribution
    from fastprice.inference.price_heads import PriceHead
    from fastprice.models.engine import Engine

__all__ = ["PricePredictor"]

CHUNK = 4096  # texts whose distributions are held at once, about 16 KB each


class PricePredictor:
    """What a `PriceEstimator` can do once it has a model: everything that reads a price and changes nothing."""

    output: str
    max_tokens: int
    batch_size: int
    fallback_price_: float
    ceiling_price_: float
    calibration_: Calibration | None
    _engine: Engine
    _model: Any
    _tokenizer: Any
    _head: PriceHead | None = None
    _decoder: PriceDecoder | None = None
    _distributions_missing: bool = False

    def predict(self, texts: Sequence[str] | Sequence[Item], *, loss: str = "mae") -> NDArray[np.float64]:
        """Prices in dollars, float64 of shape (N,), never missing once fitted.

        loss  what the guesses should make small: "mae" (the median of each text's distribution), "mse" (its mean),
              "rmsle", "mape", "hits"; ConfigError names the known ones

        Where there are no distributions (`reads_distributions`), it is the greedy text, whatever the loss.
        """
        self._check_fitted()
        if not self.reads_distributions:
            prices = self.predict_greedy(texts)
            return np.where(np.isnan(prices), self.fallback_price_, prices)
        return self.guesses(self.iter_distributions(texts), loss)

    @property
    def reads_distributions(self) -> bool:
        """Whether this model gives distributions here: always on the peft engine; on unsloth, whose forward pass takes
        no masks, where a dense copy of its weights fits the memory and agrees with it (fastprice.inference.scorers.merged_decoder)."""
        self._check_fitted()
        if self._engine.takes_masks:
            return True
        if self._decoder is None and not self._distributions_missing:
            self._engine.for_prediction(self._model)
            try:
                self._price_decoder()
            except Exception as error:  # whatever a patched model raises: greedy text is still there
                warnings.warn(f"no distributions on the {self._engine.name} engine: {error}", stacklevel=2)
                self._distributions_missing = True
        return not self._distributions_missing

    def iter_distributions(
        self,
        texts: Iterable[str | Item],
        *,
        tolerance: float | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Iterator[PriceDistribution]:
        """The distributions of any number of texts, one after the other, in constant memory.

        `CHUNK` texts are read from `texts` and held at once. `tolerance` as for `distributions`; `on_batch` is told how
        many texts are done.
        """
        _refuse_string(texts)
        done = 0
        remaining: Iterator[Any] = iter(texts)
        while chunk := list(islice(remaining, CHUNK)):
            told = None if on_batch is None else (lambda count, before=done: on_batch(before + count))
            yield from self.distributions(self.prompts(chunk), tolerance=tolerance, on_batch=told)
            done += len(chunk)

    def predict_distribution(
        self,
        texts: Sequence[str] | Sequence[Item],
        *,
        output: str | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[PriceDistribution]:
        """p(price | text): over whole dollars from 1 to `ceiling_price_` from the model's own next-token probabilities,
        or over the bins of its head.

        output  None: what the estimator was made for; "text": what its digits say, also where it has a head

        Within about 1e-4 of each exact probability; `predict` and `predict_interval` walk fewer (fastprice.inference.price_decoder).
        `on_batch` is told how many texts are done. Raises ConfigError where there are none (`reads_distributions`).
        """
        return self.distributions(self.prompts(texts), tolerance=1e-4, output=output, on_batch=on_batch)

    def predict_interval(self, texts: Sequence[str] | Sequence[Item], coverage: float = 0.9) -> NDArray[np.float64]:
        """(low, high) in dollars for each text, float64 of shape (N, 2), that hold `coverage` of unseen prices.

        The model's own intervals, widened by what they missed on the validation items (fastprice.inference.conformal). Raises
        DataError when `fit` had no validation items, or too few for this coverage.
        """
        return self.intervals(self.distributions(self.prompts(texts)), coverage)

    def intervals(self, distributions: Sequence[PriceDistribution], coverage: float = 0.9) -> NDArray[np.float64]:
        """`predict_interval` for texts whose distributions are known already."""
        self._check_fitted()
        if self.calibration_ is None:
            raise DataError("intervals are calibrated on validation items, and fit had none: fit(train, validation)")
        whole_range = (1.0, self.ceiling_price_)
        bounds = [
            whole_range if each.is_empty else self.calibration_.interval(each, coverage) for each in distributions
        ]
        return np.array(bounds, dtype=np.float64).reshape(-1, 2)

    def explain(self, text: str, *, loss: str = "mae") -> Explanation:
        """Which words of `text` moved its estimate, and by how many dollars: `fastprice.inference.explain`."""
        from fastprice.inference.explain import explain

        return explain(self, text, loss=loss)

    def predict_greedy(self, texts: Sequence[str] | Sequence[Item]) -> NDArray[np.float64]:
        """The price that the model writes when each next token is the likeliest: the usual way, for comparison.

        Dollars, float64 of shape (N,); NaN where what it writes is no price, at most `ceiling_price_`.
        """
        from fastprice.inference.price_decoder import greedy_prices

        prompts = [prompt.ids for prompt in self.prompts(texts)]
        prices = greedy_prices(self._model, self._tokenizer, prompts, batch_size=self.batch_size, form=self.form)
        return np.minimum(prices, self.ceiling_price_)

    @property
    def model(self) -> Any:
        """The transformers model with its adapters, in the state for prediction; NotFittedError without one."""
        self._check_fitted()
        self._engine.for_prediction(self._model)
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer; NotFittedError without one."""
        self._check_fitted()
        return self._tokenizer

    def prompts(self, texts: Sequence[str] | Sequence[Item]) -> list[Prompt]:
        """The prompts of `texts` as the model reads them; each tells how many tokens of its text were cut."""
        self._check_fitted()
        _refuse_string(texts)
        return [encode_prompt(self._tokenizer, text_of(text), self.max_tokens, self.form) for text in texts]

    def distributions(
        self,
        prompts: Sequence[Prompt],
        *,
        tolerance: float | None = None,
        output: str | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[PriceDistribution]:
        """The distributions of texts that are prompts already; `tolerance` None: what a point estimate needs.

        `output` is that of `predict_distribution`.
        """
        from fastprice.inference.price_decoder import QUICK

        self._check_fitted()
        if output not in (None, "text", "head") or (output == "head" and self._head is None):
            raise ConfigError(f"output: {output!r} cannot be read from an estimator with output={self.output!r}")
        if not self.reads_distributions:
            raise ConfigError(f"engine: {self._engine.name} gives no distributions; save, then load with engine='peft'")
        self._engine.for_prediction(self._model)
        ids = [prompt.ids for prompt in prompts]
        if self._head is not None and output != "text":
            return self._read_head(self._head, ids, on_batch)
        return self._price_decoder().distributions(
            ids,
            tolerance=QUICK if tolerance is None else tolerance,
            batch_size=self.batch_size,
            on_batch=on_batch,
        )

    def _read_head(
        self, head: PriceHead, prompts: Sequence[Sequence[int]], on_batch: Callable[[int], None] | None
    ) -> list[PriceDistribution]:
        """Through the dense copy of the weights where there is one."""
        import torch

        from fastprice.inference.price_heads import head_distributions

        states = self._price_decoder().last_states(prompts, batch_size=self.batch_size, on_batch=on_batch)
        if states is None:
            return head_distributions(self._model, head, prompts, batch_size=self.batch_size, on_batch=on_batch)
        with torch.inference_mode():
            return head.distributions(head(states))

    def guesses(self, distributions: Iterable[PriceDistribution], loss: str = "mae") -> NDArray[np.float64]:
        """The best guess of each distribution for `loss`, in dollars; `fallback_price_` for an empty distribution."""
        prices = np.array([each.estimate(loss) for each in distributions], dtype=np.float64)
        return np.where(np.isnan(prices), self.fallback_price_, prices)

    def score(self, items: Sequence[Item] | Sequence[str], prices: ArrayLike | None = None) -> float:
        """R² of the predictions, as scikit-learn's regressors score; for error in dollars use `fastprice.score`."""
        from sklearn.metrics import r2_score

        truths = [price_of(item) for item in items] if prices is None else prices
        return float(r2_score(truths, self.predict(items)))

    def _price_decoder(self) -> PriceDecoder:
        """Kept from call to call, as it holds a dense copy of the weights; `fit` drops it."""
        from fastprice.inference.price_decoder import PriceDecoder

        if self._decoder is None:
            highest = max(1, round(self.ceiling_price_))
            self._decoder = PriceDecoder.of(
                self._model, self._tokenizer, max_price=highest, form=self.form, masks=self._engine.takes_masks
            )
        return self._decoder

    def _check_fitted(self) -> None:
        if not hasattr(self, "_model"):
            raise NotFittedError(
                "this PriceEstimator has no model yet: call fit(train, validation) or PriceEstimator.load"
            )

    @property
    def form(self) -> Form:
        """How prompts ask for the price and answers tell it (fastprice.prompts.template)."""
        return FORMS["json" if self.output == "json" else "text"]


def _refuse_string(texts: object) -> None:
    if isinstance(texts, str):
        raise DataError("predict takes a list of texts, not one string: write predict([text])")
