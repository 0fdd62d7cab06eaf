"""Retrieval: the k most similar priced training items as examples, the most similar last.

Similarity is BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; here bm25s)
or the cosine of sentence embeddings. The item itself, its near-duplicates and the items of its group are excluded:
their prices would be the answer, and are not known when a price is estimated in practice. Near-duplicates are those
that `fastprice.data.splitting` keeps together.

The median price of the k neighbors is an estimate by itself (`NearestNeighbors.median_prices`): a model with these
examples is only useful if its errors are smaller.
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
from fastprice.prompting.examples import allowed_examples, check_priced, prompts_with_examples
from fastprice.prompting.prompt_builder import PromptBuilder
from fastprice.prompting.strategy import PromptBatch

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["BM25Index", "EmbeddingIndex", "NearestNeighbors", "Retrieval", "SimilarityIndex", "load_sentence_encoder"]

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_WORD = re.compile(r"\w+(?:[.\-]\w+)*")  # "8", "3.5" and "B660-I" are one word each
_CANDIDATES = 32  # checked at once, where some of the first k are not allowed


class SimilarityIndex(Protocol):
    """Similarities of M texts to a query."""

    def build(self, texts: Sequence[str]) -> None:
        """Indexes the M texts."""

    def scores(self, query: str) -> NDArray[np.float32]:
        """float32 (M,), higher for more similar texts; 0 or less: nothing in common."""


class BM25Index:
    """BM25 (Lucene's variant) over words in lower case."""

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
    """The cosine of embeddings; `encode` turns N texts into an array (N, width) with rows of any length."""

    def __init__(self, encode: Callable[[list[str]], ArrayLike]) -> None:
        self.encode = encode

    def build(self, texts: Sequence[str]) -> None:
        self.vectors_MW = self._unit_vectors(texts)

    def scores(self, query: str) -> NDArray[np.float32]:
        return np.asarray(self.vectors_MW @ self._unit_vectors([query])[0], dtype=np.float32)

    def _unit_vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.asarray(self.encode(list(texts)), dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[np.float32] = vectors / np.where(lengths > 0, lengths, np.float32(1))
        return unit


def load_sentence_encoder(model: str = ENCODER) -> Callable[[list[str]], ArrayLike]:
    """A function from N texts to their embeddings (N, width), by a sentence-transformers model (a folder or a hub id).

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
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"no sentence-transformers model {model!r} could be loaded ({reason}); check the network or use retrieval:K"
        ) from error

    def encode(texts: list[str]) -> ArrayLike:
        return np.asarray(loaded.encode(texts, show_progress_bar=False))

    return encode


class NearestNeighbors:
    """The k priced items most similar to an item by `index`."""

    def __init__(self, k: int, index: SimilarityIndex) -> None:
        self.k, self.index = k, index

    def fit(self, train: Sequence[Item]) -> Self:
        self.items_ = check_priced(train, 1, "retrieval")
        self.index.build([item.text for item in self.items_])
        return self

    def find(self, item: Item) -> list[Item]:
        """At most k items, the most similar first; fewer where fewer have anything in common with `item`."""
        if not hasattr(self, "items_"):
            raise DataError("retrieval has no items yet: call fit(train) first")
        scores = self.index.scores(item.text)
        # Stable, so that of equal scores the earlier row comes first on every machine.
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > 0]
        found: list[Item] = []
        step = self.k
        while len(order) and len(found) < self.k:
            best, order = np.split(order, [step])
            step = _CANDIDATES
            candidates = [self.items_[index] for index in best]
            allowed = allowed_examples(item, candidates)
            found += [candidate for candidate, is_allowed in zip(candidates, allowed, strict=True) if is_allowed]
        return found[: self.k]

    def median_prices(self, items: Sequence[Item]) -> NDArray[np.float64]:
        """The median price of each item's neighbors (of all training items if it has none), dollars, float64 (N,)."""
        overall = float(np.median([price_of(item) for item in self.items_]))
        found = (self.find(item) for item in items)
        return np.array([np.median([price_of(each) for each in near]) if near else overall for near in found])


class Retrieval:
    """The item's nearest neighbors as examples; `label` is added to the name."""

    def __init__(self, k: int = 4, *, index: SimilarityIndex | None = None, label: str = "") -> None:
        self.k = k
        self.name = f"retrieval:{k}{label}"
        self.neighbors = NearestNeighbors(k, BM25Index() if index is None else index)

    def fit(self, train: Sequence[Item]) -> Self:
        self.neighbors.fit(train)
        return self

    def build_prompts(self, estimator: PriceEstimator, items: Sequence[Item]) -> PromptBatch:
        examples = [self.neighbors.find(item)[::-1] for item in items]
        batch = prompts_with_examples(PromptBuilder.for_estimator(estimator), items, examples)
        batch.tally["examples not found"] = self.k * len(items) - sum(map(len, examples))
        return batch


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
