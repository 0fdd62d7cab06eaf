"""Conversion of units and currencies for tool calls.

Units are converted by pint; a request may name only those listed here, in any case. **Currencies are converted by a
fixed table, the euro reference rates that the European Central Bank published for 28 February 2025**: off by as much as
exchange rates have changed since, which is good enough to compare prices of other countries but not for payments.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from fastprice.prompting.tools.calculator import MAX_MAGNITUDE, ToolError

if TYPE_CHECKING:
    from pint import UnitRegistry

__all__ = ["RATES_DATE", "convert"]

RATES_DATE = "2025-02-28"
# One euro in each currency.
_PER_EURO = {
    "EUR": 1.0, "USD": 1.0411, "GBP": 0.82608, "JPY": 156.96, "CHF": 0.9394, "CAD": 1.5019, "AUD": 1.6741,
    "NZD": 1.8579, "CNY": 7.5782, "HKD": 8.0980, "INR": 90.9710, "KRW": 1519.92, "MXN": 21.2191, "BRL": 6.0712,
    "SEK": 11.1880, "NOK": 11.7245, "DKK": 7.4583, "PLN": 4.1503, "CZK": 25.029, "HUF": 399.50, "TRY": 38.0186,
    "ILS": 3.7457, "SGD": 1.4037, "THB": 35.567, "ZAR": 19.1917,
}  # fmt: skip
# What a request may name, in lower case, and pint's name for it: its own are case-sensitive (mb is a millibarn there).
_UNITS = {
    "length": {
        "mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer", "in": "inch", "ft": "foot",
        "yd": "yard", "mi": "mile",
    },
    "mass": {"mg": "milligram", "g": "gram", "kg": "kilogram", "oz": "ounce", "lb": "pound"},
    "volume": {
        "ml": "milliliter", "cl": "centiliter", "l": "liter", "floz": "fluid_ounce", "cup": "cup", "pt": "pint",
        "qt": "quart", "gal": "gallon",
    },
    "area": {"cm2": "centimeter**2", "m2": "meter**2", "in2": "inch**2", "ft2": "foot**2"},
    "data": {"mb": "megabyte", "gb": "gigabyte", "tb": "terabyte"},
    "time": {"s": "second", "min": "minute", "h": "hour", "day": "day"},
    "power": {"w": "watt", "kw": "kilowatt", "hp": "horsepower"},
    "money": {name.lower(): name for name in _PER_EURO},
}  # fmt: skip
_KINDS = {name: (kind, unit) for kind, units in _UNITS.items() for name, unit in units.items()}
_LONG_NAMES = {
    "inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "yards": "yd", "mile": "mi", "miles": "mi",
    "gram": "g", "grams": "g", "ounce": "oz", "ounces": "oz", "pound": "lb", "pounds": "lb", "lbs": "lb",
    "liter": "l", "liters": "l", "litre": "l", "litres": "l", "cups": "cup", "pint": "pt", "pints": "pt",
    "quart": "qt", "quarts": "qt", "gallon": "gal", "gallons": "gal", "hour": "h", "hours": "h", "days": "day",
    "dollar": "usd", "dollars": "usd", "euro": "eur", "euros": "eur", "yen": "jpy",
}  # fmt: skip
_REQUEST = re.compile(r"\s*([\d.,]{1,24})\s*([A-Za-z0-9]{1,8})\s+(?:to|in|->)\s+([A-Za-z0-9]{1,8})\s*", re.ASCII)


def convert(request: str) -> float:
    """The amount of `request` ("50 EUR to USD", "12 oz to kg") in the unit after "to"; ToolError if impossible."""
    parsed = _REQUEST.fullmatch(request)
    if parsed is None:
        raise ToolError("write a number, its unit, to, and the other unit, such as 12 oz to kg")
    try:
        amount = float(parsed[1].replace(",", ""))
    except ValueError as error:
        raise ToolError(f"{parsed[1]} is not a number") from error
    kind, unit = _unit(parsed[2])
    other_kind, other = _unit(parsed[3])
    if kind != other_kind:
        raise ToolError(f"{parsed[2]} is {kind} and {parsed[3]} is {other_kind}")
    result = amount / _PER_EURO[unit] * _PER_EURO[other] if kind == "money" else amount * _factor(unit, other)
    if not abs(result) <= MAX_MAGNITUDE:
        raise ToolError("the result is too large")
    return result


def _unit(name: str) -> tuple[str, str]:
    """(Kind, name) of a unit or currency in any case: pint's name of the unit, or the currency's code."""
    found = _KINDS.get(_LONG_NAMES.get(name.lower(), name.lower()))
    if found is None:
        raise ToolError(f"no unit {name}")
    return found


@cache
def _factor(unit: str, other: str) -> float:
    return float(_registry().convert(1.0, unit, other))


@cache
def _registry() -> UnitRegistry[float]:
    # Imported by the first call that needs it: 0.6 s.
    from pint import UnitRegistry

    return UnitRegistry()
