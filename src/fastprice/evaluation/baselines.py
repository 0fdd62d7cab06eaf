"""Three ways to estimate prices from text without a language model, fitted on the same items as the tuned model.

A tuned model is worth its cost only by what it adds to these, so they are set up to be hard to beat. All learn
ln(1 + price): prices spread over orders of magnitude, and its mean, taken back to dollars, lies near the median, which
is what an absolute error rewards. All guess within the range of the prices they were fitted on.

Settings were chosen by the error on unseen groups of two real sets of prices up to $1,000: computer parts (12,434
items to learn from, 3,123 to guess; mean absolute error $51.5 by ridge and $54.4 by LightGBM, median $126.1) and
classified advertisements (4,505 and 1,114; $110.3, $111.4 and $153.3). Tried on the parts and left: ridge on words
alone, $2 to $3 worse; three-word terms, no better; scikit-learn's default tokens, which drop single digits, $3 worse;
LightGBM on single words, $3 worse.
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
    """A scikit-learn regressor from texts to dollars; subclasses fill in `_fit` and `_predict` in ln(1 + dollars)."""

    name: ClassVar[str]

    def fit(self, texts: Sequence[str], prices: ArrayLike) -> Self:
        """Learns from N texts and their N prices in dollars.

        Raises DataError for no items, lengths that differ, or a price that is not a finite number above $0.
        """
        prices_N = np.asarray(prices, dtype=np.float64)
        if prices_N.shape != (len(texts),) or not len(texts):
            raise DataError(f"{len(texts)} texts and prices of shape {prices_N.shape}: give one price for each text")
        if not (np.isfinite(prices_N) & (prices_N > 0)).all():
            raise DataError("a price to learn from is not a finite number above $0: leave such items out")
        logs_N = np.log1p(prices_N)
        self.log_range_ = float(logs_N.min()), float(logs_N.max())
        self._fit(list(texts), logs_N)
        return self

    def predict(self, texts: Sequence[str]) -> FloatArray:
        """N texts -> N dollars, float64, each within the range of the training prices and so above 0."""
        if not hasattr(self, "log_range_"):
            raise NotFittedError(f"this {type(self).__name__} has learnt nothing yet: call fit first")
        if not len(texts):
            return np.empty(0)
        logs_N = np.asarray(self._predict(list(texts)), dtype=np.float64)
        return np.expm1(np.clip(logs_N, *self.log_range_))

    def _fit(self, texts: list[str], logs_N: FloatArray) -> None:
        raise NotImplementedError

    def _predict(self, texts: list[str]) -> FloatArray:
        raise NotImplementedError


class ConstantBaseline(Baseline):
    """The median training price for everything: the constant with the least absolute error."""

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
    """TF-IDF of the commonest one- and two-word terms, then gradient-boosted trees (LightGBM).

    `threads` is 1 for a reason: with as many threads as cores, LightGBM's threads wait for one another by spinning,
    and where anything else runs the fit of 12,434 rows took 490 s on two threads in place of 15 s on one.
    The same `seed` gives the same trees whatever the number of threads.
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
            # LightGBM's own minima (20 in a leaf, 3 in a bin) allow no split at all among a few dozen items.
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
    """The three, unfitted, weakest first; `seed` and `threads` are for LightGBM (see there why not every core)."""
    return [ConstantBaseline(), RidgeBaseline(), LightGBMBaseline(seed=seed, threads=threads)]


def _vectorizer(**settings: Any) -> TfidfVectorizer:
    return TfidfVectorizer(sublinear_tf=True, dtype=np.float32, **settings)


class _Terms:
    """TF-IDF matrices of several vectorizers side by side; one column of zeros where no text has any term."""

    def __init__(self, *vectorizers: TfidfVectorizer) -> None:
        self.vectorizers = list(vectorizers)

    def fit_transform(self, texts: list[str]) -> sparse.csr_matrix:
        # scikit-learn refuses to fit a vectorizer without a single term.
        self.vectorizers = [each for each in self.vectorizers if any(map(each.build_analyzer(), texts))]
        return self._beside([each.fit_transform(texts) for each in self.vectorizers], len(texts))

    def transform(self, texts: list[str]) -> sparse.csr_matrix:
        return self._beside([each.transform(texts) for each in self.vectorizers], len(texts))

    @staticmethod
    def _beside(parts: list[sparse.csr_matrix], rows: int) -> sparse.csr_matrix:
        return sparse.hstack(parts, format="csr") if parts else sparse.csr_matrix((rows, 1), dtype=np.float32)
