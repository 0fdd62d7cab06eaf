"""Cleaning: what is repaired, masked and rejected, with the reason; no row is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.paths import SHARED

from fastprice.data.cleaning import MASK, clean_items, repair_text, text_key
from fastprice.data.items import Item, Items, Reject, load_items
from fastprice.data.money import find_prices
from fastprice.errors import ConfigError

DATA = SHARED / "data"


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("  two   words\t here ", "two words here"),
        ("one\r\ntwo\rthree\n \n\n four", "one\ntwo\nthree\nfour"),
        ("cafe\u0301", "café"),
        ("zero\u200bwidth\ufeff and\u00ad soft", "zerowidth and soft"),
        ("bell\x07 nul\0 delete\x7f", "bell nul delete"),
        ("no\u00a0break\u2003em", "no break em"),
        ("half \ud800 pair", "half pair"),
        ("👍 naïve — 日本語", "👍 naïve — 日本語"),
        ("\x1c", ""),
    ],
)
def test_broken_text_is_repaired(broken: str, repaired: str) -> None:
    assert repair_text(broken) == repaired


@given(st.text())
def test_repair_is_idempotent_and_loses_no_printable_character(text: str) -> None:
    repaired = repair_text(text)
    assert repair_text(repaired) == repaired
    repaired.encode("utf-8")
    assert "  " not in repaired
    assert all(character.isprintable() or character == "\n" or ord(character) > 127 for character in repaired)
    ascii_words = [character for character in text if character.isascii() and character.isalnum()]
    assert [c for c in repaired if c.isascii() and c.isalnum()] == ascii_words or not text.isascii()


def test_each_rejected_row_has_its_reason() -> None:
    items = Items(
        [
            Item("a good lamp", 25.0, None, 2),
            Item("too expensive", 999.5, None, 3),
            Item("too cheap", 0.49, None, 4),
            Item("x\u200b ", 25.0, None, 5),
            Item("A  good LAMP", 25.0, None, 6),
            Item("A good lamp", 30.0, None, 7),
            Item("without a price", None, "g", 8),
            Item("$80", 80.0, None, 9),
            Item("at the edges", 0.5, None, 10),
            Item("at the edges", 999.49, None, 11),
            Item("not a number", float("nan"), None, 12),
        ],
        rejects=[Reject(1, "no price", "earlier")],
        source="shop.csv",
        notes=["earlier note"],
    )
    clean = clean_items(items)
    assert [item.row for item in clean] == [2, 7, 8, 10, 11]
    assert clean.rejects == [
        Reject(1, "no price", "earlier"),
        Reject(3, "price 999.50 is not within $0.50 to 999.49", "too expensive"),
        Reject(4, "price 0.49 is not within $0.50 to 999.49", "too cheap"),
        Reject(5, "text shorter than 3 characters", "x\u200b "),
        Reject(6, "duplicate of row 2", "A  good LAMP"),
        Reject(9, "text shorter than 3 characters", "$80"),
        Reject(12, "price nan is not within $0.50 to 999.49", "not a number"),
    ]
    assert (clean.source, clean.notes) == ("shop.csv", ["earlier note"])
    assert items[0].text == "a good lamp"
    assert len(items.rejects) == 1


def test_price_range_and_text_length_are_settings() -> None:
    items = [Item("lamp", 5000.0), Item("tv", 50.0)]
    assert [item.text for item in clean_items(items, max_price=1e4, min_chars=1)] == ["lamp", "tv"]
    assert clean_items(items, min_price=60).rejects[-1].text == "tv"
    assert [item.text for item in clean_items(items, min_price=50, max_price=50, min_chars=1)] == ["tv"]
    free = clean_items([Item("free lamp", 0.0)], min_price=0)
    assert (len(free), free.source) == (1, "")
    assert clean_items([Item("lamp", 5.0)] * 2).rejects == [Reject(None, "duplicate of an earlier item", "lamp")]


@pytest.mark.parametrize(
    ("text", "price", "masked"),
    [
        ("Bike, $80 obo, paid $200", 80.0, f"Bike, {MASK} obo, paid $200"),
        ("Bike, 1,800 O.B.O", 1800.0, f"Bike, {MASK} O.B.O"),
        ("now $80, yes $80.00 or 80 dollars", 80.0, f"now {MASK}, yes {MASK} or {MASK}"),
        ("listed at $79.99", 80.0, f"listed at {MASK}"),
        ("listed at $79.99", 79.99, f"listed at {MASK}"),
        ("was $49.50", 50.0, f"was {MASK}"),
        ("paid $200, now $80", 80.0, f"paid $200, now {MASK}"),
        ("about $80", 79.99, f"about {MASK}"),
        ("was $1399.99 all year", 1399.0, f"was {MASK} all year"),
        ("$80 or $81 or $79.20", 80.0, f"{MASK} or $81 or $79.20"),
        ("model 80, 80 W, 80 cm, R80", 80.0, "model 80, 80 W, 80 cm, R80"),
        ("$2 or $1.60", 1.61, "$2 or $1.60"),
        ("$80", None, "$80"),
    ],
)
def test_the_items_own_price_is_masked(text: str, price: float | None, masked: str) -> None:
    (item,) = clean_items([Item(text, price)], max_price=1e6)
    assert item.text == masked


def test_masking_all_prices_or_none_and_its_note() -> None:
    items = [Item("Bike $80, paid $200", 80.0), Item("Chair €5", None), Item("Lamp", 3.0)]
    every = clean_items(items, mask="prices")
    assert [item.text for item in every] == [f"Bike {MASK}, paid {MASK}", f"Chair {MASK}", "Lamp"]
    assert every.notes == ["masked 3 prices in 2 texts"]
    assert clean_items(items).notes == ["masked 1 prices in 1 texts"]
    off = clean_items(items, mask="off")
    assert [item.text for item in off] == [item.text for item in items]
    assert off.notes == []


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="mask 'all': write 'own'"):
        clean_items([], mask="all")  # type: ignore[arg-type]
    for bounds in ({"min_price": 5, "max_price": 4}, {"min_price": -1}, {"max_price": float("nan")}):
        with pytest.raises(ConfigError, match="min_price"):
            clean_items([], **bounds)


WORDS = ["lamp", "Lamp", " ", "$5", "5 dollars", "\u200b", "x", "\n", "5"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=5).map("".join)


@settings(max_examples=200)
@given(
    st.lists(st.builds(Item, TEXTS, st.none() | st.sampled_from([0.1, 5.0, 2000.0, float("nan")])), max_size=20),
    st.sampled_from(["own", "prices", "off"]),
)
def test_no_item_is_lost_and_cleaning_again_changes_nothing(items: list[Item], mask: str) -> None:
    numbered = [Item(item.text, item.price, None, row) for row, item in enumerate(items)]
    clean = clean_items(numbered, mask=mask)  # type: ignore[arg-type]
    assert sorted(made.row for made in [*clean, *clean.rejects]) == list(range(len(items)))
    assert len({(text_key(item.text), item.price) for item in clean}) == len(clean)
    for item in clean:
        if mask == "prices" or (mask == "own" and item.price is not None):
            assert all(mask == "own" and mention.value != item.price for mention in find_prices(item.text))
    again = clean_items(clean, mask=mask)  # type: ignore[arg-type]
    assert (again, again.rejects) == (list(clean), clean.rejects)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are missing")
def test_label_leaks_of_craigslist_are_masked() -> None:
    """Its README counts 3,179 rows with their own "$<price>"; sellers' phrases without a dollar sign add to them."""
    items = load_items(DATA / "craigslist/craigslist.jsonl.gz", text=["title", "description"], price="price")
    assert len(items) == 10_591
    clean = clean_items(items, max_price=1e6)
    assert len(clean) + len(clean.rejects) == 10_591
    assert 3_000 <= sum(MASK in item.text for item in clean) <= 3_600
    assert 300 <= sum(reject.reason.startswith("duplicate") for reject in clean.rejects) <= 415
    assert sum(f"${item.price:.0f} " in item.text for item in clean if item.price) == 0
