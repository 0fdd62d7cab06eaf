"""The synthetic catalog: reproducible, without prices in its texts, with prices that depend on them."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from itertools import islice
from random import Random

import pytest

from fastprice.data.synthetic import generate_offers, make_synthetic_items
from fastprice.data.synthetic.categories import CATEGORIES, ChoiceAttribute, NumberAttribute
from fastprice.data.synthetic.random_draws import pick, pick_weighted, shuffled, standard_normal
from fastprice.data.synthetic.words import BRAND_FACTORS, CONDITION_FACTORS, CONDITION_PHRASES, SELLER_SPELLINGS

N = 10_000
FIRST_TEXT = (
    "maplecroft home ultra building blocks: have 50 other ads, take a look - bought it 33 months ago for a project - "
    "never used, no packaging - 400 pieces, 8 years age, castle theme"
)
FIRST_PRICE = 49.99
FIRST_GROUP = "building-blocks/Maplecroft Home Ultra"
# Mean absolute error in dollars and hits in percent, as the docstring of fastprice.data.synthetic.generator gives them.
FAIR = (19.6, 95.9)
CONSTANT = (147.1, 33.4)


@pytest.fixture(scope="module")
def items():
    return make_synthetic_items(N, seed=0)


@pytest.fixture(scope="module")
def offers():
    return list(islice(generate_offers(0), N))


def error(true_prices, estimates):
    """Mean absolute error in dollars, and the share in percent within $40 or 20 % of the truth."""
    errors = [abs(price - estimate) for price, estimate in zip(true_prices, estimates, strict=True)]
    hits = [miss < 40 or miss < 0.2 * price for miss, price in zip(errors, true_prices, strict=True)]
    return statistics.mean(errors), 100 * statistics.mean(hits)


def test_same_seed_same_items_and_a_shorter_catalog_is_the_beginning_of_a_longer_one():
    assert make_synthetic_items(200, seed=3) == make_synthetic_items(200, seed=3)
    assert make_synthetic_items(200, seed=3)[:100] == make_synthetic_items(100, seed=3)
    assert [item.text for item in make_synthetic_items(50, seed=3)] != [
        item.text for item in make_synthetic_items(50, seed=4)
    ]
    assert [item.row for item in make_synthetic_items(3)] == [1, 2, 3]


def test_the_first_item_is_the_same_on_every_platform():
    first = make_synthetic_items(1, seed=0)[0]
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


def test_no_text_contains_its_price(items):
    money = re.compile(r"[$€£]|\b(?:usd|dollars?|price|cost)\b", re.IGNORECASE)
    for item in items:
        assert not money.search(item.text), item.text
        numbers = re.findall(r"\d+(?:\.\d+)?", item.text)
        assert item.price not in map(float, numbers), item


def test_fair_prices_have_small_errors_and_the_median_price_large_ones(items, offers):
    prices = [item.price for item in items]
    fair, fair_hits = error(prices, [offer.fair_price for offer in offers])
    constant, constant_hits = error(prices, [statistics.median(prices)] * N)
    assert fair == pytest.approx(FAIR[0], abs=0.05)
    assert fair_hits == pytest.approx(FAIR[1], abs=0.05)
    assert constant == pytest.approx(CONSTANT[0], abs=0.05)
    assert constant_hits == pytest.approx(CONSTANT[1], abs=0.05)
    assert fair < 0.2 * constant


def test_category_and_brand_each_explain_part_of_the_price(offers):
    """The mean error around the median of a group falls from no groups to categories to categories and brands."""

    def residual(key):
        groups: dict[object, list[float]] = {}
        for offer in offers:
            groups.setdefault(key(offer), []).append(offer.price)
        errors = []
        for group in groups.values():
            median = statistics.median(group)
            errors += [abs(price - median) for price in group]
        return statistics.mean(errors)

    nothing = residual(lambda offer: 0)
    category = residual(lambda offer: offer.product.category.slug)
    brand = residual(lambda offer: (offer.product.category.slug, offer.product.brand))
    assert nothing > 1.15 * category
    assert category > 1.05 * brand


def test_a_group_is_one_product_whose_name_is_in_every_text(offers):
    members: dict[str, list] = {}
    for offer in offers:
        members.setdefault(offer.group, []).append(offer)
    assert len({id(offer.product) for offer in offers}) == len(members)
    assert sum(len(group) > 1 for group in members.values()) > 0.1 * len(members)
    assert any(len({offer.condition for offer in group}) > 1 for group in members.values())
    for group in members.values():
        name = f"{group[0].product.brand} {group[0].product.model}".lower()
        assert all(name in offer.text.lower() for offer in group)


def test_every_category_condition_and_style_occurs(items, offers):
    assert len(CATEGORIES) >= 50
    assert len({category.slug for category in CATEGORIES}) == len(CATEGORIES)
    assert {offer.product.category.slug for offer in offers} == {category.slug for category in CATEGORIES}
    assert {offer.condition for offer in offers} == set(CONDITION_PHRASES)
    assert max(offer.quantity for offer in offers) >= 12
    assert len({item.text for item in items}) > 0.98 * N
    lines = [item.text.count("\n") for item in items]
    assert 0.3 < statistics.mean(count >= 3 for count in lines) < 0.7
    assert statistics.mean(count == 0 for count in lines) > 0.3


def test_stated_facts_are_in_the_text(offers):
    def respelled(text):
        for word, spelling in SELLER_SPELLINGS.items():
            text = text.replace(word, spelling)
        return text

    for offer in offers[:2_000]:
        for value in offer.facts.values():
            assert value in ("yes", "no", "none") or respelled(value.lower()) in respelled(offer.text.lower()), offer


def test_every_category_has_valid_attributes_and_factors():
    assert set(BRAND_FACTORS) == set(CONDITION_FACTORS) == {category.department for category in CATEGORIES}
    for category in CATEGORIES:
        assert category.base_price > 0
        assert len({attribute.name for attribute in category.attributes}) == len(category.attributes) >= 2
        for attribute in category.attributes:
            if isinstance(attribute, NumberAttribute):
                assert list(attribute.values) == sorted(set(attribute.values)), (category.slug, attribute.name)
                assert attribute.values[0] > 0
            else:
                assert isinstance(attribute, ChoiceAttribute)
                assert all(factor > 0 for factor in attribute.factors.values())


def test_zero_items_are_an_empty_list_and_fewer_are_refused():
    assert make_synthetic_items(0) == []
    with pytest.raises(ValueError, match="-1 items"):
        make_synthetic_items(-1)


def test_draws_follow_their_distributions():
    rng = Random(1)
    counts = Counter(pick(rng, "abc") for _ in range(3_000))
    assert all(900 < counts[letter] < 1_100 for letter in "abc")
    counts = Counter(pick_weighted(rng, {"a": 3.0, "b": 1.0}) for _ in range(4_000))
    assert 2_850 < counts["a"] < 3_150
    assert sorted(shuffled(rng, range(10))) == list(range(10))
    assert shuffled(rng, range(10)) != shuffled(rng, range(10))
    draws = [standard_normal(rng) for _ in range(4_000)]
    assert abs(statistics.mean(draws)) < 0.06
    assert 0.95 < statistics.stdev(draws) < 1.05
