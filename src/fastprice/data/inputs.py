"""What `fit` and `predict` were given, as items with prices, texts, and draws of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastprice.data.items import Item
from fastprice.errors import DataError

__all__ = ["draw_items", "price_of", "text_of", "training_items"]


def training_items(
    train: Sequence[Item] | Sequence[str], second: Sequence[Item] | ArrayLike | None
) -> tuple[list[Item], list[Item]]:
    """(training items, validation items) from `fit(items, items)`, `fit(items)` or scikit-learn's `fit(texts, y)`."""
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


def _paired(left: list[Any], right: list[Any]) -> list[tuple[Any, Any]]:
    if len(left) != len(right):
        raise DataError(f"{len(left)} texts but {len(right)} prices: give one price for each text")
    return list(zip(left, right, strict=True))


def price_of(item: Any) -> float:
    price = getattr(item, "price", None)
    if price is None or not np.isfinite(price) or price <= 0:
        where = (
            f"row {item.row}" if getattr(item, "row", None) is not None else f"item {getattr(item, 'text', item)!r:.60}"
        )
        raise DataError(f"{where} has no usable price ({price}): every item here needs one above 0")
    return float(price)


def text_of(text: Any) -> str:
    return text.text if isinstance(text, Item) else str(text)


def draw_items(items: list[Item], most: int, seed: int) -> list[Item]:
    if len(items) <= most:
        return items
    chosen = np.random.default_rng(seed).choice(len(items), most, replace=False)
    return [items[index] for index in sorted(chosen)]
