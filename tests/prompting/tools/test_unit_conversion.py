"""Unit and currency conversion: defined sizes, a dated table of rates, errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice.prompting.tools.calculator import ToolError
from fastprice.prompting.tools.unit_conversion import RATES_DATE, convert


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


def test_every_unit_has_its_defined_size() -> None:
    # Every unit against its definition: inches, pounds and US gallons are exact in SI.
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
        "import sys; from fastprice.prompting.tools.unit_conversion import convert; convert('5 eur to usd')\n"
        "assert 'pint' not in sys.modules; convert('1 in to cm'); assert 'pint' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_rates_are_those_of_a_stated_day() -> None:
    import fastprice.prompting.tools.unit_conversion as module

    assert RATES_DATE == "2025-02-28"
    assert "28 February 2025" in str(module.__doc__)


@pytest.mark.parametrize(
    "wrong", ["12 oz to m", "5 zorkmid to usd", "oz to kg", "1 kg", "", "1.2.3 kg to g", "1 kg to"]
)
def test_impossible_conversions_are_refused(wrong: str) -> None:
    with pytest.raises(ToolError):
        convert(wrong)


@given(st.sampled_from(["cm", "in", "ft", "mi"]), st.sampled_from(["mm", "m", "yd"]), st.floats(0.01, 1e4))
def test_converting_back_gives_the_amount(one: str, other: str, amount: float) -> None:
    there = convert(f"{amount:.9f} {one} to {other}")
    assert convert(f"{there:.9f} {other} to {one}") == pytest.approx(amount, rel=1e-5, abs=1e-3)
