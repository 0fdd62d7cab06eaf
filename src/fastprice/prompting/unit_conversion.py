"""Conversion of units and of currencies, for a model that asks.

Units have a factor each, to the base unit of their kind. **Currencies are converted by a fixed table, the euro
reference rates that the European Central Bank published for 28 February 2025**: right to about as much as exchange
rates have moved since, which is enough to tell what a price of another country means and no good for payments.
"""

from __future__ import annotations

import re

from fastprice.prompting.calculator import LARGEST, CallError

__all__ = ["RATES_DATE", "convert"]

RATES_DATE = "2025-02-28"
# One euro in each currency.
_PER_EURO = {
    "EUR": 1.0, "USD": 1.0411, "GBP": 0.82608, "JPY": 156.96, "CHF": 0.9394, "CAD": 1.5019, "AUD": 1.6741,
    "NZD": 1.8579, "CNY": 7.5782, "HKD": 8.0980, "INR": 90.9710, "KRW": 1519.92, "MXN": 21.2191, "BRL": 6.0712,
    "SEK": 11.1880, "NOK": 11.7245, "DKK": 7.4583, "PLN": 4.1503, "CZK": 25.029, "HUF": 399.50, "TRY": 38.0186,
    "ILS": 3.7457, "SGD": 1.4037, "THB": 35.567, "ZAR": 19.1917,
}  # fmt: skip
# Sizes in a base unit of each kind; inches, pounds and US gallons by their definitions.
_SIZES = {
    "length": {
        "mm": 0.001, "cm": 0.01, "m": 1.0, "km": 1000.0, "in": 0.0254, "ft": 0.3048, "yd": 0.9144, "mi": 1609.344,
    },
    "mass": {"mg": 1e-6, "g": 0.001, "kg": 1.0, "oz": 0.028349523125, "lb": 0.45359237},
    "volume": {
        "ml": 0.001, "cl": 0.01, "l": 1.0, "floz": 0.0295735295625, "cup": 0.2365882365, "pt": 0.473176473,
        "qt": 0.946352946, "gal": 3.785411784,
    },
    "area": {"cm2": 0.0001, "m2": 1.0, "in2": 0.00064516, "ft2": 0.09290304},
    "data": {"mb": 1e6, "gb": 1e9, "tb": 1e12},
    "time": {"s": 1.0, "min": 60.0, "h": 3600.0, "day": 86400.0},
    "power": {"w": 1.0, "kw": 1000.0, "hp": 745.6998715822702},
    "money": {name.lower(): 1 / rate for name, rate in _PER_EURO.items()},
}  # fmt: skip
_KINDS = {name: (kind, size) for kind, sizes in _SIZES.items() for name, size in sizes.items()}
_LONG = {
    "inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "yards": "yd", "mile": "mi", "miles": "mi",
    "gram": "g", "grams": "g", "ounce": "oz", "ounces": "oz", "pound": "lb", "pounds": "lb", "lbs": "lb",
    "liter": "l", "liters": "l", "litre": "l", "litres": "l", "cups": "cup", "pint": "pt", "pints": "pt",
    "quart": "qt", "quarts": "qt", "gallon": "gal", "gallons": "gal", "hour": "h", "hours": "h", "days": "day",
    "dollar": "usd", "dollars": "usd", "euro": "eur", "euros": "eur", "yen": "jpy",
}  # fmt: skip
_REQUEST = re.compile(r"\s*([\d.,]{1,24})\s*([A-Za-z0-9]{1,8})\s+(?:to|in|->)\s+([A-Za-z0-9]{1,8})\s*", re.ASCII)


def convert(request: str) -> float:
    """What `request` ("50 EUR to USD", "12 oz to kg") asks for, in the unit after "to"; CallError when it cannot be."""
    asked = _REQUEST.fullmatch(request)
    if asked is None:
        raise CallError("write a number, its unit, to, and the other unit, such as 12 oz to kg")
    try:
        amount = float(asked[1].replace(",", ""))
    except ValueError as error:
        raise CallError(f"{asked[1]} is not a number") from error
    kind, size = _unit(asked[2])
    other_kind, other_size = _unit(asked[3])
    if kind != other_kind:
        raise CallError(f"{asked[2]} is {kind} and {asked[3]} is {other_kind}")
    result = amount * size / other_size
    if not abs(result) <= LARGEST:
        raise CallError("the result is too large")
    return result


def _unit(name: str) -> tuple[str, float]:
    """(kind, size) of a unit or currency, whatever its case."""
    found = _KINDS.get(_LONG.get(name.lower(), name.lower()))
    if found is None:
        raise CallError(f"no unit {name}")
    return found
