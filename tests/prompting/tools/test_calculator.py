"""The calculator: the results of Python, and never anything but a number or a ToolError."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprice.prompting.tools.calculator import MAX_CHARACTERS, MAX_MAGNITUDE, ToolError, calculate

NUMBERS = st.one_of(st.integers(0, 10**6), st.floats(0, 1e6).map(lambda value: round(value, 3))).map(
    lambda value: f"{value:.6f}" if isinstance(value, float) else str(value)
)


def answer(expression: str) -> tuple[float | None, str]:
    """(Value, "") or (None, error message); any other exception is a failure."""
    try:
        return calculate(expression), ""
    except ToolError as error:
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
@given(EXPRESSIONS.filter(lambda text: len(text) <= MAX_CHARACTERS))
def test_it_calculates_as_python_does(expression: str) -> None:
    try:
        # Every number with a point: Python's integers would be exact and endless.
        expected = eval(re.sub(r"(?<![\d.])(\d+)(?![\d.])", r"\1.0", expression))
    except (ZeroDivisionError, OverflowError):
        expected = math.inf
    found, message = answer(expression)
    if isinstance(expected, complex) or not abs(expected) <= MAX_MAGNITUDE:
        assert found is None
    elif found is None:
        assert message == "the result is too large", "only an intermediate result can be too large"
    else:
        assert found == pytest.approx(expected, rel=1e-12)


@settings(max_examples=500)
@given(st.one_of(st.text(max_size=200), st.text(alphabet="0123456789.+-*/%() ,$", max_size=200)))
def test_any_text_gives_a_finite_number_or_an_error(text: str) -> None:
    found, message = answer(text)
    assert message or (isinstance(found, float) and abs(found) <= MAX_MAGNITUDE)


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os').system('true')", "(1).__class__", "[1 for _ in 'a']", "1 if 1 else 2", "lambda: 1", "x",
        "1e5", "True", "9**9**9**9", "2**100000", "1" * 121, "(" * 60 + "1" + ")" * 59, "1 / 0", "5 % 0", "(-8) ** 0.5",
        "", "()", "1 2", "1,2", "0777", "0 ** -1", "'1'", "1;2", "1\n+2", "١+١",
    ],
)  # fmt: skip
def test_anything_but_arithmetic_is_refused(hostile: str) -> None:
    with pytest.raises(ToolError):
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
