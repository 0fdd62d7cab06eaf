"""`PricePredictor`: prices, distributions and intervals from a model that `PriceEstimator` trained or loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprice.data.estimator_inputs import price_of, text_of
from fastprice.data.items import Item
from fastprice.errors import ConfigError, DataError, NotFittedError
from fastprice.prompts.template import FORMS, AnswerFormat, Prompt, encode_prompt

if TYPE_CHECKING:
    from fastprice.inference.conformal import Calibration
    from fastprice.inference.explain import Explanation
    from fastprice.inference.price_decoder import PriceDecoder
    from fastprice.inference.price_distribution import PriceDistribution
    from fastprice.inference.price_heads import PriceHead
    from fastprice.models.engine import Engine

__all__ = ["PricePredictor"]

CHUNK = 4096  # texts whose distributions are in memory at once, about 16 KB each


class PricePredictor:
    """What a `PriceEstimator` can do once it has a model: everything that reads prices off it and changes nothing.

    `gives_distributions_` says whether price distributions can be computed here. It is True with the peft engine. With
    unsloth, whose forward pass takes no attention masks, it is decided when the model is prepared or loaded: a merged
    copy of the weights must fit the memory and agree with the model (fastprice.inference.scorers.merged_decoder).
    """

    output: str
    max_tokens: int
    batch_size: int
    fallback_price_: float
    ceiling_price_: float
    calibration_: Calibration | None
    gives_distributions_: bool = True
    _engine: Engine
    _model: Any
    _tokenizer: Any
    _head: PriceHead | None = None
    _decoder: PriceDecoder | None = None

    def predict(self, texts: Sequence[str] | Sequence[Item], *, criterion: str = "mae") -> NDArray[np.float64]:
        """Prices in dollars, float64 of shape (N,), never missing once fitted.

        Args:
            texts: N texts or items; the prices of items are not read.
            criterion: what the estimates minimize: "mae" (the median of each text's distribution), "mse" (its mean),
                "rmsle", "mape" or "hits".

        Without distributions (`gives_distributions_`), these are the greedy prices, whatever the criterion. Raises
        NotFittedError without a model, ConfigError for an unknown criterion.
        """
        self._check_fitted()
        if self._usable_decoder() is None:
            prices = self.predict_greedy(texts)
            return np.where(np.isnan(prices), self.fallback_price_, prices)
        return self.estimates(self.iter_distributions(texts), criterion)

    def iter_distributions(
        self,
        texts: Iterable[str | Item],
        *,
        tolerance: float | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Iterator[PriceDistribution]:
        """The distributions of any number of texts, one after the other, in constant memory.

        `CHUNK` texts are taken from `texts` at once. `tolerance` as for `distributions`; `on_batch` is called with the
        number of finished texts.
        """
        _refuse_string(texts)
        done = 0
        remaining: Iterator[Any] = iter(texts)
        while chunk := list(islice(remaining, CHUNK)):
            on_chunk = None if on_batch is None else (lambda count, before=done: on_batch(before + count))
            yield from self.distributions(self.prompts(chunk), tolerance=tolerance, on_batch=on_chunk)
            done += len(chunk)

    def predict_distribution(
        self,
        texts: Sequence[str] | Sequence[Item],
        *,
        output: str | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[PriceDistribution]:
        """p(price | text) of each text, over whole dollars from 1 to `ceiling_price_`, or by a price head.

        The first from the model's next-token probabilities, the second over the head's bins or quantiles.

        Args:
            texts: N texts or items.
            output: None: as the estimator was made; "text": from the digits, also where it has a price head.
            on_batch: called with the number of finished texts.

        Within about 1e-4 of each exact probability; `predict` and `predict_interval` score fewer prices
        (fastprice.inference.trie_walk). Raises ConfigError where there are no distributions (`gives_distributions_`).
        """
        from fastprice.inference.price_decoder import DISTRIBUTION_TOLERANCE

        return self.distributions(
            self.prompts(texts), tolerance=DISTRIBUTION_TOLERANCE, output=output, on_batch=on_batch
        )

    def predict_interval(self, texts: Sequence[str] | Sequence[Item], coverage: float = 0.9) -> NDArray[np.float64]:
        """Calibrated intervals (low, high) in dollars, float64 of shape (N, 2), with `coverage` of unseen prices.

        The model's own intervals, made wider or narrower by split-conformal calibration on the validation items
        (fastprice.inference.conformal). Raises DataError when `fit` had no validation items, or too few for this
        coverage.
        """
        return self.intervals(self.distributions(self.prompts(texts)), coverage)

    def intervals(self, distributions: Sequence[PriceDistribution], coverage: float = 0.9) -> NDArray[np.float64]:
        """`predict_interval` for texts whose distributions are known; an empty one gets the whole range of prices."""
        self._check_fitted()
        if self.calibration_ is None:
            raise DataError("intervals are calibrated on validation items, and fit had none: fit(train, validation)")
        whole_range = (1.0, self.ceiling_price_)
        bounds = [
            whole_range if each.is_empty else self.calibration_.interval(each, coverage) for each in distributions
        ]
        return np.array(bounds, dtype=np.float64).reshape(-1, 2)

    def explain(self, text: str, *, criterion: str = "mae") -> Explanation:
        """The effect of each word of `text` on its estimate, in dollars: `fastprice.inference.explain`."""
        from fastprice.inference.explain import explain

        return explain(self, text, criterion=criterion)

    def predict_greedy(self, texts: Sequence[str] | Sequence[Item]) -> NDArray[np.float64]:
        """The price that the model generates when each next token is the likeliest: the usual way, for comparison.

        Dollars, float64 of shape (N,), at most `ceiling_price_`; NaN where the generated text is no price.
        """
        from fastprice.inference.greedy import greedy_prices

        prompts = [prompt.ids for prompt in self.prompts(texts)]
        prices = greedy_prices(self._model, self._tokenizer, prompts, batch_size=self.batch_size, form=self.form)
        return np.minimum(prices, self.ceiling_price_)

    @property
    def model(self) -> Any:
        """The transformers model with its adapters, in the mode for prediction; NotFittedError without one."""
        self._check_fitted()
        self._engine.for_prediction(self._model)
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer; NotFittedError without one."""
        self._check_fitted()
        return self._tokenizer

    def prompts(self, texts: Sequence[str] | Sequence[Item]) -> list[Prompt]:
        """The prompts of `texts` as the model reads them; each has the number of tokens of its text that were cut."""
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
        """The distributions of texts that are prompts already; `tolerance` None: that of point estimates.

        `output`, `on_batch` and errors are those of `predict_distribution`.
        """
        from fastprice.inference.price_decoder import SAMPLING_TOLERANCE

        self._check_fitted()
        if output not in (None, "text", "head") or (output == "head" and self._head is None):
            raise ConfigError(f"output: {output!r} cannot be read from an estimator with output={self.output!r}")
        decoder = self._usable_decoder()
        if decoder is None:
            raise ConfigError(f"engine: {self._engine.name} gives no distributions; save, then load with engine='peft'")
        self._engine.for_prediction(self._model)
        ids = [prompt.ids for prompt in prompts]
        if self._head is not None and output != "text":
            return self._read_head(self._head, decoder, ids, on_batch)
        return decoder.distributions(
            ids,
            tolerance=SAMPLING_TOLERANCE if tolerance is None else tolerance,
            batch_size=self.batch_size,
            on_batch=on_batch,
        )

    def _read_head(
        self,
        head: PriceHead,
        decoder: PriceDecoder,
        prompts: Sequence[Sequence[int]],
        on_batch: Callable[[int], None] | None,
    ) -> list[PriceDistribution]:
        """The head's distributions; hidden states come from the merged copy of the weights where there is one."""
        import torch

        from fastprice.inference.price_heads import head_distributions

        hidden = decoder.last_hidden_states(prompts, batch_size=self.batch_size, on_batch=on_batch)
        if hidden is None:
            return head_distributions(self._model, head, prompts, batch_size=self.batch_size, on_batch=on_batch)
        with torch.inference_mode():
            return head.distributions(head(hidden))

    def estimates(self, distributions: Iterable[PriceDistribution], criterion: str = "mae") -> NDArray[np.float64]:
        """The estimate of each distribution for `criterion`, in dollars; `fallback_price_` for an empty one."""
        prices = np.array([each.estimate(criterion) for each in distributions], dtype=np.float64)
        return np.where(np.isnan(prices), self.fallback_price_, prices)

    def score(self, items: Sequence[Item] | Sequence[str], prices: ArrayLike | None = None) -> float:
        """R² of the predictions, as scikit-learn's regressors score; for error in dollars use `fastprice.score`."""
        from sklearn.metrics import r2_score

        truths = [price_of(item) for item in items] if prices is None else prices
        return float(r2_score(truths, self.predict(items)))

    def _decide_distributions(self) -> None:
        """Sets `gives_distributions_` for a model that was just attached; warns where it is False.

        A model that takes attention masks always gives distributions; of any other, the merged copy is made at once.
        """
        self.gives_distributions_, self._decoder = True, None
        if not self._engine.takes_masks:
            self._usable_decoder()

    def _usable_decoder(self) -> PriceDecoder | None:
        """The decoder of the present weights, made where there is none; None where there are no distributions.

        It is kept from call to call, as it holds a merged copy of the weights; `fit` drops it. The memory for another
        copy may be missing by then: so the decision can still turn to False, with a warning.
        """
        from fastprice.inference.price_decoder import NoDistributionsError, PriceDecoder

        if self._decoder is None and self.gives_distributions_:
            self._engine.for_prediction(self._model)
            highest = max(1, round(self.ceiling_price_))
            try:
                self._decoder = PriceDecoder.of(
                    self._model,
                    self._tokenizer,
                    max_price=highest,
                    form=self.form,
                    takes_masks=self._engine.takes_masks,
                )
            except NoDistributionsError as error:
                warnings.warn(
                    f"no distributions on the {self._engine.name} engine: {error}; prices are greedy text", stacklevel=3
                )
                self.gives_distributions_ = False
        return self._decoder

    def _check_fitted(self) -> None:
        if not hasattr(self, "_model"):
            raise NotFittedError(
                "this PriceEstimator has no model yet: call fit(train, validation) or PriceEstimator.load"
            )

    @property
    def form(self) -> AnswerFormat:
        """How prompts request the price and answers write it (fastprice.prompts.template)."""
        return FORMS["json" if self.output == "json" else "text"]


def _refuse_string(texts: object) -> None:
    if isinstance(texts, str):
        raise DataError("predict takes a list of texts, not one string: write predict([text])")
