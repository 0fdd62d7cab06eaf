"""The product categories of the synthetic catalog, one file for each family of departments."""

from __future__ import annotations

from fastprice.data.synthetic.categories.category import Category, ChoiceAttribute, NumberAttribute
from fastprice.data.synthetic.categories.computing import COMPUTING
from fastprice.data.synthetic.categories.devices import DEVICES
from fastprice.data.synthetic.categories.household import HOME
from fastprice.data.synthetic.categories.life import LIFE
from fastprice.data.synthetic.categories.wear import WEAR
from fastprice.data.synthetic.categories.work import WORK

__all__ = ["CATEGORIES", "Category", "ChoiceAttribute", "NumberAttribute"]

CATEGORIES: tuple[Category, ...] = COMPUTING + DEVICES + HOME + WORK + WEAR + LIFE
