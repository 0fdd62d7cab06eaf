"""Prices in text: a table of what people and models write, and properties that hold for any text."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprice.data.money import find_prices, format_price, mask_prices, parse_price

# Characters of which prices are made, so that random texts come near to them.
PRICEY = st.text(alphabet="0123456789.,'$€-–+ \u00a0\nkKmMeEUSDobdlarsc%_xX/", max_size=40)


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("$1,299.99", 1299.99),
        ("1299.99", 1299.99),
        ("1.299,99 €", 1299.99),
        ("USD 15", 15),
        ("usd15", 15),
        ("15 dollars", 15),
        ("15USD", 15),
        ("$1.2k", 1200),
        ("1.2k", 1200),
        ("$2 million", 2e6),
        ("  $ 80 obo", 80),
        ("$.99", 0.99),
        (".5", 0.5),
        ("99¢", 0.99),
        ("1 299,00", 1299),
        ("1\u00a0299,00\u00a0€", 1299),
        ("1'299.50 CHF", 1299.5),
        ("１２９９", 1299),
        ("＄８０．５０", 80.5),
        ("123.00\n", 123),
        ("123</s>", 123),
        ("Price is $45", 45),
        ("Price is $45.00<|eot_id|>", 45),
        ("US$80", 80),
        ("CA$ 80", 80),
        ("80$", 80),
        ("$5-10", 5),
        ("1e3", 1000),
        ("1e+16", 1e16),
        ("1,234,567.89", 1234567.89),
        ("1.234.567,89", 1234567.89),
        # ambiguous, decided: US first
        ("1,299", 1299),
        ("1.299", 1.299),
        ("1.299 €", 1299),
        ("EUR 1.299", 1299),
        ("1.299.000", 1299000),
        ("12,50", 12.5),
        ("0,299", 0.299),
        ("1,2,3", 1),
        ("192.168.1.1", 192.168),
        # what stands beside a currency wins, what is part of a word never counts
        ("2 x 8GB kit, $45", 45),
        ("paid 80 $100", 100),
        ("DDR4-3200 45", 45),
        ("PS4 obo, 80 obo", 80),
        ("was $0, now $15", 15),
        ("- mint\n-$850 firm", 850),
    ],
)
def test_the_first_price_is_read(text: str, price: float) -> None:
    assert parse_price(text) == pytest.approx(price, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "free",
        " ",
        "N/A",
        "None",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "$",
        "k",
        ".",
        ",",
        "0",
        "0.00",
        "$0.00",
        "-5",
        "-$5",
        "$-5",
        "−5",
        "1e400",
        "16GB",
        "x570",
        "RTX-3080",
        "50%",
        "1_000",
    ],
)
def test_no_price_is_none_and_never_zero(text: str) -> None:
    assert parse_price(text) is None


def test_neither_an_empty_text_nor_a_number_beyond_floats_is_a_price() -> None:
    assert parse_price("") is None
    assert parse_price("9" * 400) is None


@pytest.mark.parametrize("value", [None, 5, 5.0, b"$5", ["$5"]])
def test_only_strings_are_read(value: object) -> None:
    with pytest.raises(TypeError, match="string"):
        parse_price(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="string"):
        mask_prices(value)  # type: ignore[arg-type]


@given(st.one_of(st.text(max_size=60), PRICEY))
def test_any_text_gives_a_positive_finite_price_or_none(text: str) -> None:
    price = parse_price(text)
    assert price is None or (isinstance(price, float) and 0 < price < math.inf)


@given(
    st.floats(min_value=0.01, max_value=1e12), st.sampled_from(["{}", "Price is {}", "{} or best offer", "x {}</s>"])
)
def test_a_formatted_price_reads_back(price: float, around: str) -> None:
    assert parse_price(around.format(format_price(price))) == pytest.approx(round(price, 2), rel=1e-12)


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_a_printed_float_reads_back_exactly(price: float) -> None:
    assert parse_price(repr(price)) == price


@given(st.integers(1, 10**9), st.integers(0, 99))
def test_european_and_american_writing_agree(dollars: int, cents: int) -> None:
    american = f"{dollars:,}.{cents:02}"
    european = american.translate(str.maketrans(",.", ".,"))
    assert parse_price(f"${american}") == parse_price(f"{european} €") == float(f"{dollars}.{cents:02}")


def test_prices_are_formatted_for_people() -> None:
    assert format_price(1299.99) == "$1,299.99"
    assert format_price(0.5) == "$0.50"
    assert format_price(-3) == "-$3.00"
    assert format_price(0) == "$0.00"
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            format_price(bad)


@pytest.mark.parametrize(
    ("text", "masked", "count"),
    [
        ("asking $80 obo", "asking [price] obo", 1),
        ("USD 80 or 80 dollars", "[price] or [price]", 2),
        ("$1.2k, 20 bucks, €5, 5 €", "[price], [price], [price], [price]", 4),
        ("$80-90", "[price]-[price]", 2),
        ("60-80 dollars", "60-[price]", 1),
        ("$80 USD", "[price]", 1),
        ("asking for 680, 1500obo", "asking for [price], [price]obo", 2),
        ("$$$80", "[price]", 1),
        ("iPhone 6 128GB, 20 in wide, 5% off, PS4 obo", "iPhone 6 128GB, 20 in wide, 5% off, PS4 obo", 0),
        ("Size 10, 2017, 415-555-1234", "Size 10, 2017, 415-555-1234", 0),
        ("", "", 0),
    ],
)
def test_money_is_masked_and_other_numbers_are_not(text: str, masked: str, count: int) -> None:
    assert mask_prices(text) == (masked, count)


def test_the_mask_is_the_callers() -> None:
    assert mask_prices("now $5!", "<P>") == ("now <P>!", 1)


@given(st.one_of(st.text(max_size=60), PRICEY))
def test_mentions_lie_in_order_within_the_text(text: str) -> None:
    end = 0
    for mention in find_prices(text):
        assert end <= mention.start < mention.end <= len(text)
        assert 0 <= mention.value < math.inf
        end = mention.end
    masked, count = mask_prices(text, "\0")
    assert count == len(list(find_prices(text)))
    assert masked.count("\0") == count + text.count("\0") - sum(
        text[mention.start : mention.end].count("\0") for mention in find_prices(text)
    )


@given(st.text(alphabet="abc xyz.,\n", max_size=20), st.integers(1, 9999), st.text(alphabet="abc xyz\n", max_size=20))
def test_a_dollar_price_is_always_masked(before: str, dollars: int, after: str) -> None:
    masked, count = mask_prices(f"{before} ${dollars} {after}")
    assert count == 1
    assert str(dollars) not in masked


@pytest.mark.parametrize(
    "unit", ["1", "1,", "1,234,", "$", "$1 ", "1.", " ", "-", "1 234 ", "1e", "asking ", "US", "￥", "'123"]
)
def test_the_time_taken_is_linear_in_the_length(unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        best = math.inf
        for _ in range(4):
            start = time.process_time()
            parse_price(text)
            mask_prices(text)
            best = min(best, time.process_time() - start)
        return best

    # Quadratic work would take 256 times as long, linear work 16; the constant keeps the clock's grain out of it.
    assert seconds(64_000) <= 64 * seconds(4_000) + 0.02


@settings(max_examples=30)
@given(PRICEY, st.integers(1, 200))
def test_repetition_never_breaks_the_parser(text: str, times: int) -> None:
    price = parse_price(text * times)
    assert price is None or 0 < price < math.inf
