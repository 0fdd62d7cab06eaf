"""What fit and predict accept: items, or texts with prices."""

from __future__ import annotations

import numpy as np
import pytest

from fastprice.data.estimator_inputs import as_items, as_training_items, draw_items, price_of, text_of
from fastprice.data.items import Item
from fastprice.errors import DataError

LAMP, CHAIR = Item("lamp", 5.0), Item("chair", 6.0)


def test_items_may_come_with_validation_items_and_texts_with_prices() -> None:
    assert as_training_items([LAMP], None) == ([LAMP], [])
    assert as_training_items([LAMP], [CHAIR]) == ([LAMP], [CHAIR])
    assert as_training_items(["lamp", "chair"], np.array([5, 6])) == ([LAMP, CHAIR], [])
    assert as_training_items([Item("lamp", 1.0, "group")], [5]) == ([LAMP], [])


def test_texts_without_a_price_for_each_are_refused() -> None:
    for train, second, message in [
        ([], None, "non-empty list"),
        ("lamp", [5.0], "non-empty list"),
        (["lamp"], None, r"fit\(texts, prices\)"),
        (["lamp", "chair"], [5.0], "2 texts but 1 prices"),
    ]:
        with pytest.raises(DataError, match=message):
            as_training_items(train, second)


def test_texts_become_items_without_a_price() -> None:
    assert as_items([LAMP, "chair"]) == [LAMP, Item("chair")]  # type: ignore[list-item]
    assert [text_of(each) for each in (LAMP, "chair", 7)] == ["lamp", "chair", "7"]
    with pytest.raises(DataError, match="not one string"):
        as_items("lamp")


@pytest.mark.parametrize("price", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_an_item_without_a_usable_price_is_named(price: float | None) -> None:
    assert price_of(LAMP) == 5.0
    with pytest.raises(DataError, match="row 7 has no usable price"):
        price_of(Item("lamp", price, row=7))
    with pytest.raises(DataError, match="item 'lamp' has no usable price"):
        price_of(Item("lamp", price))


def test_items_are_drawn_by_seed_in_their_order() -> None:
    items = [Item(str(number), row=number) for number in range(100)]
    drawn = draw_items(items, 10, 0)
    rows = [item.row for item in drawn]
    assert len(set(rows)) == 10
    assert rows == sorted(rows, key=int)  # type: ignore[arg-type]
    assert drawn == draw_items(items, 10, 0) != draw_items(items, 10, 1)
    assert draw_items(items, 100, 0) == items
