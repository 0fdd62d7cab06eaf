"""A synthetic catalogue: realistic product texts with prices from a hidden process, any size, any seed.

The hidden process, in dollars:

    fair  = base(category) x tier(brand) ** pull x product of the attributes' factors x interactions
            x condition x extras x colour x pieces ** 0.9
    price = fair x exp(0.13 x standard normal), with an ending that shops like (.99, .95, .00, ...)

The interactions: the first two attributes of a category reinforce each other (`Category.joint`), and a dear brand asks
more for a good specification than a cheap one. Brand, category, specifications, condition and quantity are words and
numbers of the text, so the text must be read to guess the price; some styles leave minor attributes out, as sellers do.

What can be reached (10,000 items, seed 0; `tests/data/test_synthetic.py` holds the catalogue to these figures):
guessing `fair` itself has a mean absolute error of $19.6 and a hit rate (within $40 or 20 %) of 95.9 %; the median
price as a constant has $147.1 and 33.4 %. No text contains a price, nor the sign "$".

The generator draws from `random.Random(seed).random()` alone, in one sequence, so the same seed gives the same items
on every platform, and a shorter catalogue is the beginning of a longer one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from fastprice.data.items import Item
from fastprice.data.synthetic.draw import normal, pick, weighted
from fastprice.data.synthetic.goods import CATEGORIES, Category, Choice, Number
from fastprice.data.synthetic.styles import write_text
from fastprice.data.synthetic.words import BRANDS, COLOURS, CONDITIONS, MODEL_WORDS, MODES_OF_SALE

__all__ = ["Offer", "fair_prices", "make_catalogue", "offers", "write_catalogue"]

NOISE = 0.13
_OPEN_PRODUCTS = 40
_REPEAT = 0.35
_ENDINGS = (0.99, 0.99, 0.99, 0.95, 0.49, 0.0, 0.0)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Product:
    """What stays the same between the offers of one product; `worth` is its fair price, new and alone, in dollars."""

    category: Category
    brand: str
    model: str
    noun: str
    facts: dict[str, str]
    worth: float


@dataclass(frozen=True, slots=True)
class Offer:
    """One offer of a product: its text, its fair and its asked price (dollars), and what the text was made from.

    `facts` maps attribute names to values (without units) and holds only what the text says.
    """

    text: str
    price: float
    fair: float
    product: Product
    condition: str
    pieces: int
    facts: dict[str, str]

    @property
    def group(self) -> str:
        """The product's identity, shared by its offers in other colours, conditions and quantities."""
        return f"{self.product.category.slug}/{self.product.brand} {self.product.model}"


def make_catalogue(n: int, *, seed: int = 0) -> list[Item]:
    """The first `n` items of the catalogue of `seed`; `row` counts from 1, `group` is the product's identity."""
    return [
        Item(text=offer.text, price=offer.price, group=offer.group, row=row)
        for row, offer in enumerate(islice(offers(seed), _checked(n)), start=1)
    ]


def fair_prices(n: int, *, seed: int = 0) -> list[float]:
    """The hidden process without its noise (dollars) for the items of `make_catalogue(n, seed=seed)`."""
    return [offer.fair for offer in islice(offers(seed), _checked(n))]


def write_catalogue(path: str | Path, n: int, *, seed: int = 0) -> None:
    """Write `n` items as JSON lines with the columns `text`, `price` (dollars) and `group`."""
    with Path(path).open("w", encoding="utf-8") as file:
        for item in make_catalogue(n, seed=seed):
            row = {"text": item.text, "price": item.price, "group": item.group}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def offers(seed: int) -> Iterator[Offer]:
    """The endless sequence of offers of `seed`. About a third are another offer of one of the last forty products."""
    rng = Random(seed)
    recent: list[Product] = []
    names: set[tuple[str, str, str]] = set()
    while True:
        if recent and rng.random() < _REPEAT:
            product = pick(rng, recent)
        else:
            product = _product(rng, names)
            recent = [*recent[1 - _OPEN_PRODUCTS :], product]
        yield _offer(rng, product)


def _checked(n: int) -> int:
    if n < 0:
        raise ValueError(f"a catalogue cannot have {n} items: n must be 0 or more")
    return n


def _product(rng: Random, names: set[tuple[str, str, str]]) -> Product:
    """Draw a product with a name of its own. One draw of quality makes its attributes good or poor together."""
    category = pick(rng, CATEGORIES)
    brand, tier = pick(rng, tuple(BRANDS[category.department].items()))
    model = _model(rng)
    while (category.slug, brand, model) in names:
        model = _model(rng)
    names.add((category.slug, brand, model))
    quality = rng.random()
    facts, logs = {}, []
    for attribute in category.attributes:
        value, log = _value(rng, attribute, quality)
        facts[attribute.name] = value
        logs.append(log)
    specification = sum(logs)
    name = category.brand_pull * math.log(tier)
    together = category.joint * logs[0] * logs[1] + 0.15 * name * specification
    worth = category.base * math.exp(name + specification + min(max(together, -0.6), 0.6))
    return Product(category, brand, model, pick(rng, category.nouns), facts, worth)


def _value(rng: Random, attribute: Number | Choice, quality: float) -> tuple[str, float]:
    """A value for `attribute`, as text, and its contribution to the logarithm of the price."""
    if isinstance(attribute, Choice):
        value, factor = pick(rng, tuple(attribute.factors.items()))
        return value, math.log(factor)
    count = len(attribute.values)
    place = 0.6 * quality + 0.4 * rng.random() if attribute.power >= 0 else rng.random()
    number = attribute.values[min(int(place * count), count - 1)]
    return f"{number:g}", attribute.power * math.log(number / attribute.values[count // 2])


def _model(rng: Random) -> str:
    """A model name such as "Vista", "RX-340", "Terra 7 Pro"; letters, digits and words that say nothing."""
    word = pick(rng, MODEL_WORDS)
    letters = "".join(pick(rng, "ABCDEFGHKLMNPRSTVWXZ") for _ in range(1 + int(rng.random() * 3)))
    number = str(int(10 ** (0.5 + 3.4 * rng.random())))
    shape = rng.random()
    if shape < 0.3:
        return f"{letters}-{number}"
    if shape < 0.55:
        return f"{word} {number}"
    if shape < 0.75:
        return f"{letters}{number} {word}"
    return f"{word} {pick(rng, MODEL_WORDS)}"


def _offer(rng: Random, product: Product) -> Offer:
    """Draw condition, quantity, extras and colour, price the offer, and write its text in one of the styles."""
    category = product.category
    modes = MODES_OF_SALE[category.department]
    condition = weighted(rng, {mode: weight for mode, (_, weight) in modes.items()})
    pieces = pick(rng, category.packs) if category.packs and rng.random() < 0.35 else 1
    extra = pick(rng, tuple(category.extras)) if category.extras and rng.random() < 0.25 else ""
    colour = pick(rng, tuple(COLOURS)) if category.coloured and rng.random() < 0.75 else ""
    fair = product.worth * modes[condition][0] * pieces**0.9
    fair *= category.extras.get(extra, 1.0) * COLOURS.get(colour, 1.0)
    fair = max(fair, 1.0)
    price = _ending(rng, fair * math.exp(NOISE * normal(rng)))
    text, facts = write_text(
        rng,
        slug=category.slug,
        noun=product.noun,
        brand=product.brand,
        model=product.model,
        facts=product.facts,
        units={a.name: a.unit for a in category.attributes if isinstance(a, Number)},
        colour=colour,
        condition="" if condition == "new" and rng.random() < 0.6 else pick(rng, CONDITIONS[condition]),
        pieces=pieces,
        extra=extra,
    )
    if price in map(float, _NUMBER.findall(text)):
        price = round(price - 0.01, 2)  # a specification that happens to equal the price would look like a leak
    return Offer(text, price, fair, product, condition, pieces, facts)


def _ending(rng: Random, price: float) -> float:
    """`price` moved to a nearby figure with an ending that shops like; always at least $0.99, in whole cents."""
    if price >= 250 and rng.random() < 0.4:
        return 10.0 * round(price / 10) - (1.0 if rng.random() < 0.6 else 0.0)
    ending = pick(rng, _ENDINGS)
    return max(round((round(price - ending) + ending) * 100) / 100, 0.99)
