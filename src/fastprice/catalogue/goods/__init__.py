"""The goods of the synthetic catalogue, by family."""

from __future__ import annotations

from fastprice.catalogue.goods.computing import COMPUTING
from fastprice.catalogue.goods.devices import DEVICES
from fastprice.catalogue.goods.household import HOME
from fastprice.catalogue.goods.kinds import Category, Choice, Number
from fastprice.catalogue.goods.life import LIFE
from fastprice.catalogue.goods.wear import WEAR
from fastprice.catalogue.goods.work import WORK

__all__ = ["CATEGORIES", "Category", "Choice", "Number"]

CATEGORIES: tuple[Category, ...] = COMPUTING + DEVICES + HOME + WORK + WEAR + LIFE
