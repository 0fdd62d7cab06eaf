"""What a product category is: its attributes, and what each does to the hidden price.

Every brand and product line here is invented; the specification vocabulary (GB, DDR4, stainless steel) is ordinary.
A category has a base price in dollars: what a product of a mid-tier brand with mid-range attributes costs new. An
attribute is

* a `NumberAttribute`, whose value changes the price by `(value / middle value) ** power`; with power 0 by nothing;
* a `ChoiceAttribute`, whose value multiplies the price by a factor.

The first attributes of a category are the ones that a seller mentions when there is little room.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Attribute", "Category", "ChoiceAttribute", "NumberAttribute", "choice", "number", "number_range"]


@dataclass(frozen=True, slots=True)
class NumberAttribute:
    """A measured attribute: its possible values in ascending order, its unit, and its exponent in the price."""

    name: str
    unit: str
    power: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ChoiceAttribute:
    """A categorical attribute: each possible value with its factor on the price."""

    name: str
    factors: dict[str, float]


Attribute = NumberAttribute | ChoiceAttribute


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of product.

    base_price      dollars
    brand_exponent  of the brand's factor on the price: how much a brand name counts here
    interaction     multiplies the product of the first two attributes' contributions to the logarithm of the price:
                    two good values together cost more than either alone suggests
    colored         whether offers state a color
    extras          accessories that are sold with the product, with their factor on the price
    pack_sizes      the quantities, other than one, in which it is sold
    """

    slug: str
    nouns: tuple[str, ...]
    department: str
    base_price: float
    attributes: tuple[Attribute, ...]
    brand_exponent: float = 1.0
    interaction: float = 0.0
    colored: bool = True
    extras: dict[str, float] = field(default_factory=dict)
    pack_sizes: tuple[int, ...] = ()


def number(name: str, unit: str, power: float, *values: float) -> NumberAttribute:
    """A number attribute with these values, given in ascending order."""
    return NumberAttribute(name, unit, power, values)


def number_range(name: str, unit: str, power: float, low: int, high: int, step: int) -> NumberAttribute:
    """A number attribute with the values from `low` to `high` in equal steps."""
    return NumberAttribute(name, unit, power, tuple(range(low, high + 1, step)))


def choice(name: str, **factors: float) -> ChoiceAttribute:
    """A choice attribute whose values are the keyword names, underscores read as spaces."""
    return ChoiceAttribute(name, {key.replace("_", " "): factor for key, factor in factors.items()})
