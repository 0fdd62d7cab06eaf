"""What a category of goods is: its attributes, and what each does to the hidden price.

Every brand and product line here is invented; the specification vocabulary (GB, DDR4, stainless steel) is ordinary.
A category has a base price in dollars: what a mid-tier product with middling attributes costs new. An attribute is

* a `Number`, whose value raises the price as `(value / middle value) ** power`; `power` 0 means that it is only talk;
* a `Choice`, whose value multiplies the price by a factor.

The first attributes of a category are the ones that a seller mentions when there is little room.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Attribute", "Category", "Choice", "Number", "named", "numbers", "span"]


@dataclass(frozen=True, slots=True)
class Number:
    """A measured attribute: its possible values in ascending order, its unit, and its weight on the price."""

    name: str
    unit: str
    power: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A named attribute: each possible value with its factor on the price."""

    name: str
    factors: dict[str, float]


Attribute = Number | Choice


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of product.

    `brand_pull` scales the logarithm of the brand's tier (how much a name is worth here); `joint` is the interaction:
    it multiplies the product of the log-contributions of the first two attributes, so that good with good is dearer
    than either alone suggests. `extras` are things sold with the product, with their factor on the price.
    """

    slug: str
    nouns: tuple[str, ...]
    department: str
    base: float
    attributes: tuple[Attribute, ...]
    brand_pull: float = 1.0
    joint: float = 0.0
    coloured: bool = True
    extras: dict[str, float] = field(default_factory=dict)
    packs: tuple[int, ...] = ()


def numbers(name: str, unit: str, power: float, *values: float) -> Number:
    """A number with these values, given in ascending order."""
    return Number(name, unit, power, values)


def span(name: str, unit: str, power: float, low: int, high: int, step: int) -> Number:
    """A number with the values from `low` to `high` in equal steps."""
    return Number(name, unit, power, tuple(range(low, high + 1, step)))


def named(name: str, **factors: float) -> Choice:
    """A choice whose values are the keyword names, underscores read as spaces."""
    return Choice(name, {key.replace("_", " "): factor for key, factor in factors.items()})
