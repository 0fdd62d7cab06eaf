"""Numbers as the report writes them: dollars, counts, ticks of price axes."""

from __future__ import annotations

__all__ = ["count_of", "dollars", "price_tick", "signed_dollars"]


def dollars(value: float) -> str:
    """$1,234.56; from a billion on with three digits."""
    sign = "-" if value < 0 else ""
    return f"{sign}${abs(value):,.2f}" if abs(value) < 1e9 else f"{sign}${abs(value):.3g}"


def signed_dollars(value: float) -> str:
    """As `dollars`, with a plus sign where the value is not negative."""
    return dollars(value) if value < 0 else f"+{dollars(value)}"


def price_tick(value: float, position: int | None = None) -> str:
    """A price at an axis, without cents where it has none; `position` is matplotlib's second argument, not used."""
    if value >= 1e9:
        return f"${value:.3g}"
    if value == round(value):
        return f"${value:,.0f}"
    return f"${value:,.2f}" if value >= 0.01 else f"${value:g}"


def count_of(number: int, noun: str) -> str:
    """'1 item', '2,000 items'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
