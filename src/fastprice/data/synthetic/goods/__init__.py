"""The goods of the synthetic catalogue, by family."""

from __future__ import annotations

from fastprice.data.synthetic.goods.computing import COMPUTING
from fastprice.data.synthetic.goods.devices import DEVICES
from fastprice.data.synthetic.goods.household import HOME
from fastprice.data.synthetic.goods.kinds import Category, Choice, Number
from fastprice.data.synthetic.goods.life import LIFE
from fastprice.data.synthetic.goods.wear import WEAR
from fastprice.data.synthetic.goods.work import WORK

__all__ = ["CATEGORIES", "Category", "Choice", "Number"]

CATEGORIES: tuple[Category, ...] = COMPUTING + DEVICES + HOME + WORK + WEAR + LIFE
