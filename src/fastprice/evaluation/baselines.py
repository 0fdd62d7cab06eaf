"""Baselines: three estimators of prices from text without a language model, fitted on the same items as the tuned one.

A tuned model is worth its cost only by what it adds to these, so their settings are chosen to be hard to beat
(docs/LOG.md has the measurements). All predict ln(1 + price): prices range over orders of magnitude, and the mean of
the logarithm, in dollars, is near the median, which minimizes an absolute error. All estimates are within the range of
the training prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import lightgbm
import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from fastprice.common.arrays import FloatArray
from fastprice.errors import DataError, NotFittedError

__all__ = ["Baseline", "ConstantBaseline", "LightGBMBaseline", "RidgeBaseline", "default_baselines"]


_WORD = r"(?u)\w+(?:[.\-]\w+)*"  # "8", "3.5" and "B660-I" are one token each
_CHARACTER_TERMS = 50_000
_TREE_TERMS = 6_000


class Baseline(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """A scikit-learn regressor from texts to dollars; subclasses implement `_fit` and `_predict` in ln(1 + dollars)."""

    name: ClassVar[str]

    def fit(self, texts: Sequence[str], prices: ArrayLike) -> Self:
        """Fits to N texts and their N prices in dollars.

        Raises DataError for no items, lengths that differ, or a price that is not a finite number above $0.
        """
        prices_N = np.asarray(prices, dtype=np.float64)
        if prices_N.shape != (len(texts),) or not len(texts):
            raise DataError(f"{len(texts)} texts and prices of shape {prices_N.shape}: give one price for each text")
        if not (np.isfinite(prices_N) & (prices_N > 0)).all():
            raise DataError("a training price is not a finite number above $0: leave such items out")
        logs_N = np.log1p(prices_N)
        self.log_range_ = float(logs_N.min()), float(logs_N.max())
        self._fit(list(texts), logs_N)
        return self

    def predict(self, texts: Sequence[str]) -> FloatArray:
        """Estimates for N texts: dollars, float64 (N,), within the range of the training prices and so above 0."""
        if not hasattr(self, "log_range_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit first")
        if not len(texts):
            return np.empty(0)
        logs_N = np.asarray(self._predict(list(texts)), dtype=np.float64)
        return np.expm1(np.clip(logs_N, *self.log_range_))

    def _fit(self, texts: list[str], logs_N: FloatArray) -> None:
        raise NotImplementedError

    def _predict(self, texts: list[str]) -> FloatArray:
        raise NotImplementedError


class ConstantBaseline(Baseline):
    """The median training price for every text: the constant with the smallest absolute error."""

    name = "constant (median)"

    def _fit(self, texts: list[str], logs_N: FloatArray) -> None:
        self.log_median_ = float(np.log1p(np.median(np.expm1(logs_N))))

    def _predict(self, texts: list[str]) -> FloatArray:
        return np.full(len(texts), self.log_median_)


class RidgeBaseline(Baseline):
    """TF-IDF of one- and two-word terms and of 3-5 characters within words, then ridge regression.

    `alpha` is the weight of the squared coefficients.
    """

    name = "TF-IDF + ridge"

    def __init__(self, alpha: float = 0.3) -> None:
        self.alpha = alpha

    def _fit(self, texts: list[str], logs_N: FloatArray) -> None:
        self.terms_ = _Terms(
            _vectorizer(token_pattern=_WORD, ngram_range=(1, 2)),
            _vectorizer(analyzer="char_wb", ngram_range=(3, 5), max_features=_CHARACTER_TERMS),
        )
        self.model_ = Ridge(alpha=self.alpha, solver="sparse_cg").fit(self.terms_.fit_transform(texts), logs_N)

    def _predict(self, texts: list[str]) -> FloatArray:
        logs_N: FloatArray = self.model_.predict(self.terms_.transform(texts))
        return logs_N


class LightGBMBaseline(Baseline):
    """TF-IDF of the most frequent one- and two-word terms, then gradient-boosted trees (LightGBM).

    `threads` is 1 for a reason: LightGBM's threads wait for one another by spinning, so with as many threads as cores
    and any other work on the machine a fit can take thirty times as long (docs/LOG.md). The same `seed` gives the same
    trees with any number of threads.
    """

    name = "TF-IDF + LightGBM"

    def __init__(self, trees: int = 400, seed: int = 0, threads: int = 1) -> None:
        self.trees = trees
        self.seed = seed
        self.threads = threads

    def _fit(self, texts: list[str], logs_N: FloatArray) -> None:
        self.terms_ = _Terms(_vectorizer(token_pattern=_WORD, ngram_range=(1, 2), max_features=_TREE_TERMS))
        settings: dict[str, Any] = {
            "learning_rate": 0.08,
            "num_leaves": 63,
            "max_bin": 31,
            "feature_fraction": 0.3,
            # LightGBM's default minima (20 in a leaf, 3 in a bin) allow no split at all among a few dozen items.
            "min_data_in_leaf": min(5, 1 + len(texts) // 20),
            "min_data_in_bin": 3 if len(texts) >= 500 else 1,
            "seed": self.seed,
            "num_threads": self.threads,
            "deterministic": True,
            "force_row_wise": True,
            "verbose": -1,
        }
        data = lightgbm.Dataset(self.terms_.fit_transform(texts), logs_N)
        self.model_ = lightgbm.train(settings, data, num_boost_round=self.trees)

    def _predict(self, texts: list[str]) -> FloatArray:
        logs_N: FloatArray = self.model_.predict(self.terms_.transform(texts), num_threads=self.threads)
        return logs_N


def default_baselines(*, seed: int = 0, threads: int = 1) -> list[Baseline]:
    """The three baselines, unfitted, weakest first; `seed` and `threads` are those of `LightGBMBaseline`."""
    return [ConstantBaseline(), RidgeBaseline(), LightGBMBaseline(seed=seed, threads=threads)]


def _vectorizer(**settings: Any) -> TfidfVectorizer:
    return TfidfVectorizer(sublinear_tf=True, dtype=np.float32, **settings)


class _Terms:
    """TF-IDF matrices of several vectorizers side by side; one column of zeros where no text has any term."""

    def __init__(self, *vectorizers: TfidfVectorizer) -> None:
        self.vectorizers = list(vectorizers)

    def fit_transform(self, texts: list[str]) -> sparse.csr_matrix:
        # scikit-learn raises where a vectorizer finds no term at all.
        self.vectorizers = [each for each in self.vectorizers if any(map(each.build_analyzer(), texts))]
        return self._stacked([each.fit_transform(texts) for each in self.vectorizers], len(texts))

    def transform(self, texts: list[str]) -> sparse.csr_matrix:
        return self._stacked([each.transform(texts) for each in self.vectorizers], len(texts))

    @staticmethod
    def _stacked(parts: list[sparse.csr_matrix], rows: int) -> sparse.csr_matrix:
        return sparse.hstack(parts, format="csr") if parts else sparse.csr_matrix((rows, 1), dtype=np.float32)
