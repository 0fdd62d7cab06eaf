"""What `fit`, `predict` and the prompting strategies accept (items, or texts and prices), converted to items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastprice.data.items import Item
from fastprice.errors import DataError

__all__ = ["as_items", "as_training_items", "draw_items", "price_of", "text_of"]


def as_training_items(
    train: Sequence[Item] | Sequence[str], second: Sequence[Item] | ArrayLike | None
) -> tuple[list[Item], list[Item]]:
    """(Training items, validation items) of `fit(items, items)`, `fit(items)` or scikit-learn's `fit(texts, prices)`.

    Raises DataError when there is nothing to train on, or when texts have no prices or not as many.
    """
    if isinstance(train, str) or len(train) == 0:
        raise DataError("fit needs a non-empty list of items or texts to train on")
    if all(isinstance(item, Item) for item in train):
        items: list[Item] = list(train)  # type: ignore[arg-type]
        if second is None:
            return items, []
        validation: list[Any] = list(second)  # type: ignore[arg-type]
        if all(isinstance(item, Item) for item in validation):
            return items, validation
        return [Item(item.text, float(price)) for item, price in _paired(items, validation)], []
    if second is None:
        raise DataError("fit on texts needs their prices too: fit(texts, prices), or pass Items")
    return [Item(str(text), float(price)) for text, price in _paired(list(train), list(second))], []  # type: ignore[arg-type]


def _paired(texts: list[Any], prices: list[Any]) -> list[tuple[Any, Any]]:
    if len(texts) != len(prices):
        raise DataError(f"{len(texts)} texts but {len(prices)} prices: give one price for each text")
    return list(zip(texts, prices, strict=True))


def as_items(texts: Sequence[str] | Sequence[Item]) -> list[Item]:
    """Items as they are, texts as items without price or group; DataError for one string in place of a list."""
    if isinstance(texts, str):
        raise DataError("give a list of texts, not one string: write [text]")
    return [text if isinstance(text, Item) else Item(str(text)) for text in texts]


def price_of(item: Any) -> float:
    """The price of an item in dollars; DataError, which names the item, for one without a finite price above 0."""
    price = getattr(item, "price", None)
    if price is None or not np.isfinite(price) or price <= 0:
        row = getattr(item, "row", None)
        name = f"item {getattr(item, 'text', item)!r:.60}" if row is None else f"row {row}"
        raise DataError(f"{name} has no usable price ({price}): every item here needs one above 0")
    return float(price)


def text_of(text: Any) -> str:
    """The text of an item, or of anything else as a string."""
    return text.text if isinstance(text, Item) else str(text)


def draw_items(items: list[Item], max_items: int, seed: int) -> list[Item]:
    """At most `max_items` of `items`, drawn at random without replacement by `seed`, in their order."""
    if len(items) <= max_items:
        return items
    chosen = np.random.default_rng(seed).choice(len(items), max_items, replace=False)
    return [items[index] for index in sorted(chosen)]
