"""The tools' parsers: right where Python is right, and never anything but a number or a CallError."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprice.prompting.calculator import LARGEST, LONGEST, CallError, calculate
from fastprice.prompting.tools import read_call, shown_number
from fastprice.prompting.unit_conversion import RATES_DATE, convert

NUMBERS = st.one_of(st.integers(0, 10**6), st.floats(0, 1e6).map(lambda value: round(value, 3))).map(
    lambda value: f"{value:.6f}" if isinstance(value, float) else str(value)
)


def answer(expression: str) -> tuple[float | None, str]:
    """(The value, "") or (None, what is wrong); any other exception is a failure."""
    try:
        return calculate(expression), ""
    except CallError as error:
        return None, str(error)


EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner).map(" ".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(EXPRESSIONS.filter(lambda text: len(text) <= LONGEST))
def test_it_calculates_as_python_does(expression: str) -> None:
    try:
        # Every number with a point: Python's integers would be exact and endless.
        expected = eval(re.sub(r"(?<![\d.])(\d+)(?![\d.])", r"\1.0", expression))
    except (ZeroDivisionError, OverflowError):
        expected = math.inf
    found, said = answer(expression)
    if isinstance(expected, complex) or not abs(expected) <= LARGEST:
        assert found is None
    elif found is None:
        assert said == "the result is too large", "a step on the way may be too large, nothing else is wrong"
    else:
        assert found == pytest.approx(expected, rel=1e-12)


@settings(max_examples=500)
@given(st.one_of(st.text(max_size=200), st.text(alphabet="0123456789.+-*/%() ,$", max_size=200)))
def test_any_text_gives_a_finite_number_or_says_what_is_wrong(text: str) -> None:
    found, said = answer(text)
    assert said or (isinstance(found, float) and abs(found) <= LARGEST)


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os').system('true')", "(1).__class__", "[1 for _ in 'a']", "1 if 1 else 2", "lambda: 1", "x",
        "1e5", "True", "9**9**9**9", "2**100000", "1" * 121, "(" * 60 + "1" + ")" * 59, "1 / 0", "5 % 0", "(-8) ** 0.5",
        "", "()", "1 2", "1,2", "0777", "0 ** -1", "'1'", "1;2", "1\n+2", "١+١",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(hostile: str) -> None:
    with pytest.raises(CallError):
        calculate(hostile)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("$1,299 * 2", 2598),
        ("3 × 4.50", 13.5),
        ("10 ÷ 4", 2.5),
        ("-(2 - 5) ** 2", -9),
        ("2**0.5", 2**0.5),
        ("7 // 2", 3),
    ],
)
def test_sums_as_people_write_them(expression: str, value: float) -> None:
    assert calculate(expression) == pytest.approx(value)


@pytest.mark.parametrize(
    ("request_", "value"),
    [
        ("12 oz to kg", 0.3402), ("1 inch to cm", 2.54), ("3 ft to m", 0.9144), ("1 GB to mb", 1000),
        ("2 lbs to G", 907.18),
        ("1,000 ml to L", 1), ("1 EUR to USD", 1.0411), ("40 eur in usd", 41.644), ("1.0411 dollars to euros", 1),
    ],
)  # fmt: skip
def test_conversions(request_: str, value: float) -> None:
    assert convert(request_) == pytest.approx(value, rel=1e-4)


def test_every_unit_has_the_size_of_its_kind() -> None:
    # One request a unit, against the definitions: inches, pounds and US gallons are exact in SI.
    sizes = {
        "m": {"mm": 1e-3, "cm": 1e-2, "km": 1e3, "in": 0.0254, "ft": 0.3048, "yd": 0.9144, "mi": 1609.344},
        "kg": {"mg": 1e-6, "g": 1e-3, "oz": 0.45359237 / 16, "lb": 0.45359237},
        "l": {
            "ml": 1e-3, "cl": 1e-2, "gal": 3.785411784, "qt": 3.785411784 / 4, "pt": 3.785411784 / 8,
            "cup": 3.785411784 / 16, "floz": 3.785411784 / 128,
        },
        "m2": {"cm2": 1e-4, "in2": 0.0254**2, "ft2": 0.3048**2},
        "gb": {"mb": 1e-3, "tb": 1e3},
        "s": {"min": 60, "h": 3600, "day": 86400},
        "kw": {"w": 1e-3, "hp": 0.7456998715822702},
    }  # fmt: skip
    for base, units in sizes.items():
        for unit, size in units.items():
            assert convert(f"1 {unit.upper()} to {base}") == pytest.approx(size, rel=1e-12), unit


def test_pint_is_imported_by_the_first_unit_only() -> None:
    program = (
        "import sys; from fastprice.prompting.unit_conversion import convert; convert('5 eur to usd')\n"
        "assert 'pint' not in sys.modules; convert('1 in to cm'); assert 'pint' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_rates_are_those_of_a_stated_day() -> None:
    import fastprice.prompting.unit_conversion as module

    assert RATES_DATE == "2025-02-28"
    assert "28 February 2025" in str(module.__doc__)


@pytest.mark.parametrize(
    "wrong", ["12 oz to m", "5 zorkmid to usd", "oz to kg", "1 kg", "", "1.2.3 kg to g", "1 kg to"]
)
def test_what_cannot_be_converted_is_refused(wrong: str) -> None:
    with pytest.raises(CallError):
        convert(wrong)


@given(st.sampled_from(["cm", "in", "ft", "mi"]), st.sampled_from(["mm", "m", "yd"]), st.floats(0.01, 1e4))
def test_there_and_back_is_where_it_began(one: str, other: str, amount: float) -> None:
    there = convert(f"{amount:.9f} {one} to {other}")
    assert convert(f"{there:.9f} {other} to {one}") == pytest.approx(amount, rel=1e-5, abs=1e-3)


@settings(max_examples=300)
@given(
    st.one_of(st.text(max_size=120), st.text(max_size=60).map("CALL calc({})".format), st.text().map("CALL {}".format))
)
def test_reading_a_call_never_fails(line: str) -> None:
    call = read_call(line)
    if call is not None:
        assert "\n" not in call.argument
        assert call.answer


def test_calls_are_answered_or_told_what_is_wrong() -> None:
    answered = read_call("CALL calc(3 * 4.50)")
    assert answered is not None
    assert (answered.answer, answered.failed) == ("13.5", False)
    for line, said in [
        ("CALL calc(1/0)", "division by zero"),
        ("CALL calc(", "write CALL calc(...)"),
        ("CALL open(/etc/passwd)", "write CALL calc(...)"),
        ("CALL convert(1 kg to m)", "kg is mass and m is length"),
    ]:
        refused = read_call(line)
        assert refused is not None
        assert refused.failed
        assert said in refused.answer
    assert read_call("DONE") is None
    assert read_call("I CALL calc(1)") is None
    assert read_call("Call of Duty (used)") is None


def test_numbers_are_shown_short() -> None:
    assert [shown_number(value) for value in (13.5, 1 / 3, 2e6, 1e15)] == [
        "13.5",
        "0.333333",
        "2000000",
        "1" + "0" * 15,
    ]
