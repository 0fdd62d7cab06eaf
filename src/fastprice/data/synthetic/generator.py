"""The generator of the synthetic catalog, in dollars:

    fair price = base price(category) x brand factor ** brand exponent x product of the attributes' factors
                 x interactions x condition x extras x color x quantity ** 0.9
    price      = fair price x exp(0.13 x standard normal), with an ending that shops like (.99, .95, .00, ...)

The interactions: the first two attributes of a category reinforce each other (`Category.interaction`), and good
specifications raise the price of an expensive brand more than that of a cheap one. Brand, category, specifications,
condition and quantity are words and numbers of the text, so the text must be read to estimate the price; some styles
leave minor attributes out, as sellers do. No text contains a price, nor the sign "$".

What can be reached (10,000 items, seed 0; `tests/data/test_synthetic.py` checks these figures): estimating the fair
price itself has a mean absolute error of $19.6, and 95.9 % of its errors are below $40 or 20 %; the median price as a
constant has $147.1 and 33.4 %. All draws come from `random.Random(seed).random()`, in one sequence, so the same seed
gives the same items on every platform, and a shorter catalog is the beginning of a longer one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from fastprice.data.items import Item
from fastprice.data.synthetic.categories import CATEGORIES, Category, ChoiceAttribute, NumberAttribute
from fastprice.data.synthetic.random_draws import pick, pick_weighted, standard_normal
from fastprice.data.synthetic.styles import OfferDetails, write_text
from fastprice.data.synthetic.words import (
    BRAND_FACTORS,
    COLOR_FACTORS,
    CONDITION_FACTORS,
    CONDITION_PHRASES,
    MODEL_WORDS,
)

__all__ = ["Offer", "Product", "generate_offers", "make_synthetic_items"]

_NOISE = 0.13  # standard deviation of the logarithm of the price
_RECENT_PRODUCTS = 40
_REPEATED_SHARE = 0.35  # of offers: another offer of a recent product
_PRICE_ENDINGS = (0.99, 0.99, 0.99, 0.95, 0.49, 0.0, 0.0)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Product:
    """What the offers of one product have in common; `fair_price` is that of one new piece, in dollars."""

    category: Category
    brand: str
    model: str
    noun: str
    facts: dict[str, str]
    fair_price: float


@dataclass(frozen=True, slots=True)
class Offer:
    """One offer of a product: its text, its price and its fair price (dollars), and what the text was made from.

    `facts` maps attribute names to values (without units) and has only what the text states.
    """

    text: str
    price: float
    fair_price: float
    product: Product
    condition: str
    quantity: int
    facts: dict[str, str]

    @property
    def group(self) -> str:
        """The product's identity, shared by its offers in other colors, conditions and quantities."""
        return f"{self.product.category.slug}/{self.product.brand} {self.product.model}"


def make_synthetic_items(n: int, *, seed: int = 0) -> list[Item]:
    """The first `n` items of the catalog of `seed`; `row` counts from 1, `group` is the product's identity.

    Raises ValueError for a negative `n`.
    """
    if n < 0:
        raise ValueError(f"cannot make {n} items: n must be 0 or more")
    return [
        Item(text=offer.text, price=offer.price, group=offer.group, row=row)
        for row, offer in enumerate(islice(generate_offers(seed), n), start=1)
    ]


def generate_offers(seed: int) -> Iterator[Offer]:
    """The endless sequence of offers of `seed`. About a third are another offer of one of the last forty products."""
    rng = Random(seed)
    recent: list[Product] = []
    names: set[tuple[str, str, str]] = set()
    while True:
        if recent and rng.random() < _REPEATED_SHARE:
            product = pick(rng, recent)
        else:
            product = _draw_product(rng, names)
            recent = [*recent[1 - _RECENT_PRODUCTS :], product]
        yield _draw_offer(rng, product)


def _draw_product(rng: Random, names: set[tuple[str, str, str]]) -> Product:
    """A product with a unique name, which is added to `names`. One draw of quality correlates its attributes."""
    category = pick(rng, CATEGORIES)
    brand, brand_factor = pick(rng, tuple(BRAND_FACTORS[category.department].items()))
    model = _draw_model_name(rng)
    while (category.slug, brand, model) in names:
        model = _draw_model_name(rng)
    names.add((category.slug, brand, model))
    quality = rng.random()
    facts, log_factors = {}, []
    for attribute in category.attributes:
        value, log_factor = _draw_value(rng, attribute, quality)
        facts[attribute.name] = value
        log_factors.append(log_factor)
    specification = sum(log_factors)
    brand_effect = category.brand_exponent * math.log(brand_factor)
    interaction = category.interaction * log_factors[0] * log_factors[1] + 0.15 * brand_effect * specification
    fair_price = category.base_price * math.exp(brand_effect + specification + min(max(interaction, -0.6), 0.6))
    return Product(category, brand, model, pick(rng, category.nouns), facts, fair_price)


def _draw_value(rng: Random, attribute: NumberAttribute | ChoiceAttribute, quality: float) -> tuple[str, float]:
    """A value for `attribute`, as text, and its contribution to the logarithm of the price."""
    if isinstance(attribute, ChoiceAttribute):
        value, factor = pick(rng, tuple(attribute.factors.items()))
        return value, math.log(factor)
    count = len(attribute.values)
    place = 0.6 * quality + 0.4 * rng.random() if attribute.power >= 0 else rng.random()
    number = attribute.values[min(int(place * count), count - 1)]
    return f"{number:g}", attribute.power * math.log(number / attribute.values[count // 2])


def _draw_model_name(rng: Random) -> str:
    """A model name such as "Vista", "RX-340", "Terra 7 Pro": letters, digits and words without a meaning."""
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


def _draw_offer(rng: Random, product: Product) -> Offer:
    """Draw condition, quantity, extras and color, price the offer, and write its text in one of the styles."""
    category = product.category
    conditions = CONDITION_FACTORS[category.department]
    condition = pick_weighted(rng, {name: frequency for name, (_, frequency) in conditions.items()})
    quantity = pick(rng, category.pack_sizes) if category.pack_sizes and rng.random() < 0.35 else 1
    extra = pick(rng, tuple(category.extras)) if category.extras and rng.random() < 0.25 else ""
    color = pick(rng, tuple(COLOR_FACTORS)) if category.colored and rng.random() < 0.75 else ""
    fair_price = product.fair_price * conditions[condition][0] * quantity**0.9
    fair_price *= category.extras.get(extra, 1.0) * COLOR_FACTORS.get(color, 1.0)
    fair_price = max(fair_price, 1.0)
    price = _with_ending(rng, fair_price * math.exp(_NOISE * standard_normal(rng)))
    details = OfferDetails(
        slug=category.slug,
        noun=product.noun,
        brand=product.brand,
        model=product.model,
        facts=product.facts,
        units={each.name: each.unit for each in category.attributes if isinstance(each, NumberAttribute)},
        color=color,
        condition="" if condition == "new" and rng.random() < 0.6 else pick(rng, CONDITION_PHRASES[condition]),
        quantity=quantity,
        extra=extra,
    )
    text, facts = write_text(rng, details)
    if price in map(float, _NUMBER.findall(text)):
        price = round(price - 0.01, 2)  # a specification that happens to equal the price would look like a leak
    return Offer(text, price, fair_price, product, condition, quantity, facts)


def _with_ending(rng: Random, price: float) -> float:
    """`price` moved to a nearby figure with an ending that shops like; always at least $0.99, in whole cents."""
    if price >= 250 and rng.random() < 0.4:
        return 10.0 * round(price / 10) - (1.0 if rng.random() < 0.6 else 0.0)
    ending = pick(rng, _PRICE_ENDINGS)
    return max(round((round(price - ending) + ending) * 100) / 100, 0.99)
