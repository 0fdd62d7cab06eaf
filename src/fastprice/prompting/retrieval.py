"""Retrieval: the k most similar priced items of the training set before the item, the most similar last.

Similar by BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; here bm25s) or
by the cosine of sentence embeddings. The item itself, its near-duplicates and all of its group are passed over: their
prices would be the answer, and a shop that asks for a price does not have them. What counts as a near-duplicate is
what `fastprice.data.splitting` keeps together.

The median price of the k neighbors is an estimate already (`Neighbors.median_prices`): a model that is shown them has
to beat it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastprice.data.estimator_inputs import price_of
from fastprice.data.items import Item
from fastprice.errors import BaseModelError, DataError, MissingDependencyError
from fastprice.prompting.few_shot import asked_of, unlike
from fastprice.prompting.layout import layout_of
from fastprice.prompting.strategy import Asked, priced

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["BM25Index", "EmbeddingIndex", "Index", "Neighbors", "Retrieval", "sentence_encoder"]

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_WORD = re.compile(r"\w+(?:[.\-]\w+)*")  # "8", "3.5" and "B660-I" are one word each
_LOOKED_AT = 32  # candidates at once, where the first k hold copies


class Index(Protocol):
    """Scores of M texts for a query."""

    def build(self, texts: Sequence[str]) -> None: ...

    def scores(self, query: str) -> NDArray[np.float32]:
        """float32 (M,), the higher the more similar; 0 or less: nothing in common."""


class BM25Index:
    """BM25 (Lucene's variant) over words, whatever their case."""

    def build(self, texts: Sequence[str]) -> None:
        import bm25s

        self.size = len(texts)
        words = [_words(text) for text in texts]
        self.index: Any = None
        if any(words):  # bm25s divides by the mean length
            self.index = bm25s.BM25()
            self.index.index(words, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        words = _words(query)
        if self.index is None or not words:
            return np.zeros(self.size, dtype=np.float32)
        return np.asarray(self.index.get_scores(words), dtype=np.float32)


class EmbeddingIndex:
    """The cosine of embeddings; `encode` turns N texts into an (N, width) array, of any length a row."""

    def __init__(self, encode: Callable[[list[str]], ArrayLike]) -> None:
        self.encode = encode

    def build(self, texts: Sequence[str]) -> None:
        self.vectors_MW = self._unit(texts)

    def scores(self, query: str) -> NDArray[np.float32]:
        return np.asarray(self.vectors_MW @ self._unit([query])[0], dtype=np.float32)

    def _unit(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.asarray(self.encode(list(texts)), dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[np.float32] = vectors / np.where(lengths > 0, lengths, np.float32(1))
        return unit


def sentence_encoder(model: str = ENCODER) -> Callable[[list[str]], ArrayLike]:
    """The `encode` of a sentence-transformers model (a folder or a hub id).

    Raises MissingDependencyError without sentence-transformers, BaseModelError when the model cannot be loaded.
    """
    if find_spec("sentence_transformers") is None:
        raise MissingDependencyError(
            "retrieval by embeddings needs sentence-transformers: pip install 'fastprice[embeddings]'; "
            "or use retrieval:K, by BM25"
        )
    from sentence_transformers import SentenceTransformer

    try:
        loaded = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"no sentence-transformers model {model!r} could be loaded ({said}); check the network, or use retrieval:K"
        ) from error

    def encode(texts: list[str]) -> ArrayLike:
        return np.asarray(loaded.encode(texts, show_progress_bar=False))

    return encode


class Neighbors:
    """The priced items most similar to an item, found through `index`."""

    def __init__(self, k: int, index: Index) -> None:
        self.k, self.index = k, index

    def fit(self, train: Sequence[Item]) -> Self:
        self.items_ = priced(train, 1, "retrieval")
        self.index.build([item.text for item in self.items_])
        return self

    def of(self, item: Item) -> list[Item]:
        """At most k items, the most similar first; fewer where fewer have anything in common with `item`."""
        if not hasattr(self, "items_"):
            raise DataError("retrieval has nothing to look in yet: call fit(train) first")
        scores = self.index.scores(item.text)
        # Stable, so that of equal scores the earlier row comes first on every machine.
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > 0]
        found: list[Item] = []
        step = self.k
        while len(order) and len(found) < self.k:
            looked_at, order = np.split(order, [step])
            step = _LOOKED_AT
            candidates = [self.items_[index] for index in looked_at]
            found += [each for each, allowed in zip(candidates, unlike(item, candidates), strict=True) if allowed]
        return found[: self.k]

    def median_prices(self, items: Sequence[Item]) -> NDArray[np.float64]:
        """The median price of each item's neighbors in dollars, (N,); of all items where there are none."""
        everywhere = float(np.median([price_of(item) for item in self.items_]))
        found = (self.of(item) for item in items)
        return np.array([np.median([price_of(each) for each in near]) if near else everywhere for near in found])


class Retrieval:
    """Shows the model its item's `neighbors`."""

    def __init__(self, k: int = 4, *, index: Index | None = None, label: str = "") -> None:
        self.k = k
        self.name = f"retrieval:{k}{label}"
        self.neighbors = Neighbors(k, BM25Index() if index is None else index)

    def fit(self, train: Sequence[Item]) -> Self:
        self.neighbors.fit(train)
        return self

    def ask(self, estimator: PriceEstimator, items: Sequence[Item]) -> Asked:
        layout = layout_of(estimator)
        found = [self.neighbors.of(item)[::-1] for item in items]
        laid_out = [layout.price_prompt(item.text, examples=near) for item, near in zip(items, found, strict=True)]
        asked = asked_of(laid_out, sum(map(len, found)))
        asked.tally["examples not found"] = self.k * len(items) - sum(map(len, found))
        return asked


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
