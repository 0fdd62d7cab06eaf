"""The synthetic catalogue: repeatable, price-free in its text, and worth reading."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from itertools import islice
from random import Random

import pytest

from fastprice.data.synthetic import fair_prices, make_catalogue, offers, write_catalogue
from fastprice.data.synthetic.draw import normal, pick, shuffled, weighted
from fastprice.data.synthetic.goods import CATEGORIES, Choice, Number
from fastprice.data.synthetic.words import BRANDS, CONDITIONS, MODES_OF_SALE, SHORTHAND

N = 10_000
FIRST_TEXT = (
    "maplecroft home ultra building blocks: have 50 other ads, take a look - bought it 33 months ago for a project - "
    "never used, no packaging - 400 pieces, 8 years age, castle theme"
)
FIRST_PRICE = 49.99
FIRST_GROUP = "building-blocks/Maplecroft Home Ultra"
# Mean absolute error in dollars and hits in percent, as the docstring of fastprice.data.synthetic tells them.
FLOOR = (19.6, 95.9)
CONSTANT = (147.1, 33.4)


@pytest.fixture(scope="module")
def items():
    return make_catalogue(N, seed=0)


@pytest.fixture(scope="module")
def sources():
    return list(islice(offers(0), N))


def error(truths, guesses):
    """Mean absolute error in dollars, and the share in percent within $40 or 20 % of the truth."""
    errors = [abs(truth - guess) for truth, guess in zip(truths, guesses, strict=True)]
    hits = [miss < 40 or miss < 0.2 * truth for miss, truth in zip(errors, truths, strict=True)]
    return statistics.mean(errors), 100 * statistics.mean(hits)


def test_same_seed_same_items_and_a_short_catalogue_is_the_beginning_of_a_long_one():
    assert make_catalogue(200, seed=3) == make_catalogue(200, seed=3)
    assert make_catalogue(200, seed=3)[:100] == make_catalogue(100, seed=3)
    assert [item.text for item in make_catalogue(50, seed=3)] != [item.text for item in make_catalogue(50, seed=4)]
    assert [item.row for item in make_catalogue(3)] == [1, 2, 3]


def test_the_first_item_is_the_same_on_every_platform():
    first = make_catalogue(1, seed=0)[0]
    assert (first.text, first.price, first.group) == (FIRST_TEXT, FIRST_PRICE, FIRST_GROUP)


def test_prices_look_like_prices(items):
    prices = [item.price for item in items]
    assert 60 <= statistics.median(prices) <= 130
    assert statistics.mean(1 <= price <= 999.49 for price in prices) > 0.95
    assert max(prices) > 1_500
    assert all(isinstance(price, float) and price >= 0.5 and price == round(price, 2) for price in prices)
    cents = Counter(round(100 * price) % 100 for price in prices)
    assert cents[99] > 0.2 * N
    assert set(cents) <= {99, 95, 49, 0}


def test_no_text_tells_its_price(items):
    money = re.compile(r"[$€£]|\b(?:usd|dollars?|price|cost)\b", re.IGNORECASE)
    for item in items:
        assert not money.search(item.text), item.text
        numbers = re.findall(r"\d+(?:\.\d+)?", item.text)
        assert item.price not in map(float, numbers), item


def test_the_text_must_be_read_and_nearly_suffices(items):
    prices = [item.price for item in items]
    floor, floor_hits = error(prices, fair_prices(N, seed=0))
    constant, constant_hits = error(prices, [statistics.median(prices)] * N)
    assert floor == pytest.approx(FLOOR[0], abs=0.05)
    assert floor_hits == pytest.approx(FLOOR[1], abs=0.05)
    assert constant == pytest.approx(CONSTANT[0], abs=0.05)
    assert constant_hits == pytest.approx(CONSTANT[1], abs=0.05)
    assert floor < 0.2 * constant


def test_words_and_numbers_each_carry_price(sources):
    """Category alone, then category with tier of brand, condition and quantity, explain more and more."""

    def residual(key):
        groups: dict[object, list[float]] = {}
        for offer in sources:
            groups.setdefault(key(offer), []).append(offer.price)
        misses = []
        for group in groups.values():
            middle = statistics.median(group)
            misses += [abs(price - middle) for price in group]
        return statistics.mean(misses)

    nothing = residual(lambda offer: 0)
    category = residual(lambda offer: offer.product.category.slug)
    brand = residual(lambda offer: (offer.product.category.slug, offer.product.brand))
    assert nothing > 1.15 * category
    assert category > 1.05 * brand


def test_groups_are_products(sources):
    members: dict[str, list] = {}
    for offer in sources:
        members.setdefault(offer.group, []).append(offer)
    assert len({id(offer.product) for offer in sources}) == len(members)
    assert sum(len(group) > 1 for group in members.values()) > 0.1 * len(members)
    assert any(len({offer.condition for offer in group}) > 1 for group in members.values())
    for group in members.values():
        name = f"{group[0].product.brand} {group[0].product.model}".lower()
        assert all(name in offer.text.lower() for offer in group)


def test_variety(items, sources):
    assert len(CATEGORIES) >= 50
    assert len({category.slug for category in CATEGORIES}) == len(CATEGORIES)
    assert {offer.product.category.slug for offer in sources} == {category.slug for category in CATEGORIES}
    assert {offer.condition for offer in sources} == set(CONDITIONS)
    assert max(offer.pieces for offer in sources) >= 12
    assert len({item.text for item in items}) > 0.98 * N
    lines = [item.text.count("\n") for item in items]
    assert 0.3 < statistics.mean(count >= 3 for count in lines) < 0.7
    assert statistics.mean(count == 0 for count in lines) > 0.3


def test_facts_are_in_the_text(sources):
    def shortened(text):
        for word, short in SHORTHAND.items():
            text = text.replace(word, short)
        return text

    for offer in sources[:2_000]:
        for value in offer.facts.values():
            assert value in ("yes", "no", "none") or shortened(value.lower()) in shortened(offer.text.lower()), offer


def test_every_table_makes_sense():
    assert set(BRANDS) == set(MODES_OF_SALE) == {category.department for category in CATEGORIES}
    for category in CATEGORIES:
        assert category.base > 0
        assert len({attribute.name for attribute in category.attributes}) == len(category.attributes) >= 2
        for attribute in category.attributes:
            if isinstance(attribute, Number):
                assert list(attribute.values) == sorted(set(attribute.values)), (category.slug, attribute.name)
                assert attribute.values[0] > 0
            else:
                assert isinstance(attribute, Choice)
                assert all(factor > 0 for factor in attribute.factors.values())


def test_write_catalogue(tmp_path):
    path = tmp_path / "items.jsonl"
    write_catalogue(path, 20, seed=5)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected = [{"text": i.text, "price": i.price, "group": i.group} for i in make_catalogue(20, seed=5)]
    assert rows == expected


def test_an_empty_catalogue_and_a_negative_one():
    assert make_catalogue(0) == []
    with pytest.raises(ValueError, match="-1 items"):
        make_catalogue(-1)


def test_draws():
    rng = Random(1)
    counts = Counter(pick(rng, "abc") for _ in range(3_000))
    assert all(900 < counts[letter] < 1_100 for letter in "abc")
    counts = Counter(weighted(rng, {"a": 3.0, "b": 1.0}) for _ in range(4_000))
    assert 2_850 < counts["a"] < 3_150
    assert sorted(shuffled(rng, range(10))) == list(range(10))
    assert shuffled(rng, range(10)) != shuffled(rng, range(10))
    draws = [normal(rng) for _ in range(4_000)]
    assert abs(statistics.mean(draws)) < 0.06
    assert 0.95 < statistics.stdev(draws) < 1.05
