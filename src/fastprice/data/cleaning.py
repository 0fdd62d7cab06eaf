"""Cleaning of items before they are split: broken text, price range, leaked labels, exact duplicates, in that order.

No row is lost: each item that is removed becomes a `Reject`, after those that loading made. Equal texts with different
prices stay, since both are true, and so do near-duplicates; `splitting` puts them into one part.

A label leak is the item's own price in its text, as in a quarter of classified advertisements ("$80 obo" at a price of
80): a model trained on it learns to copy instead of to estimate. A mention of a price is what `money.find_prices`
finds, a number beside a currency or a seller's phrase. A bare number that happens to equal the price ("R7 370" at
$370) is not changed, nor is a price in words.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fastprice.data.items import Item, Items, Reject
from fastprice.data.money import format_price, mask_prices
from fastprice.errors import ConfigError

__all__ = ["MASK", "clean_items", "prediction_text", "repair_text", "text_key"]

MASK = "[price]"
_SPACES = re.compile(r"[^\S\n]+")
_LINE_BREAKS = re.compile(r" ?\n[ \n]*")
_EXCERPT_CHARACTERS = 200  # of the text in a reject


def clean_items(
    items: Sequence[Item],
    *,
    min_price: float = 0.50,
    max_price: float = 999.49,
    min_chars: int = 3,
    mask: Literal["prices", "own", "off"] = "own",
) -> Items:
    """The usable items in their order, with repaired and masked texts; rejects and notes are added to those of `items`.

    Args:
        items: items with or without prices (the latter for prediction).
        min_price, max_price: price range in dollars, both ends included.
        min_chars: least number of characters of a text, without masks.
        mask: "own" replaces the item's own price by "[price]" (equal to the cent, or in whole dollars where the other
            has cents), "prices" every mention of money, "off" nothing.

    Raises ConfigError for an unknown `mask` or an impossible price range.
    """
    if mask not in ("prices", "own", "off"):
        raise ConfigError(f"mask {mask!r}: write 'own', 'prices' or 'off'")
    if not 0 <= min_price <= max_price:
        raise ConfigError(
            f"min_price {min_price} and max_price {max_price}: write numbers with 0 <= min_price <= max_price"
        )
    rejects: list[Reject] = []
    clean: list[Item] = []
    first_seen: dict[tuple[str, float | None], Item] = {}
    masked = masked_texts = 0

    def reject(item: Item, reason: str) -> None:
        rejects.append(Reject(item.row, reason, item.text[:_EXCERPT_CHARACTERS]))

    for item in items:
        if item.price is not None and not min_price <= item.price <= max_price:
            reject(item, f"price {item.price:,.2f} is not within {format_price(min_price)} to {max_price:,.2f}")
            continue
        text, count = _masked(repair_text(item.text), item.price, mask)
        if len(text.replace(MASK, "").strip()) < min_chars:
            reject(item, f"text shorter than {min_chars} characters")
            continue
        cleaned = replace(item, text=text)
        first = first_seen.setdefault((text_key(text), item.price), cleaned)
        if first is not cleaned:
            reject(item, "duplicate of " + (f"row {first.row}" if first.row is not None else "an earlier item"))
            continue
        masked, masked_texts = masked + count, masked_texts + bool(count)
        clean.append(cleaned)
    notes = list(items.notes) if isinstance(items, Items) else []
    if masked:
        notes.append(f"masked {masked:,} prices in {masked_texts:,} texts")
    before = items.rejects if isinstance(items, Items) else []
    return Items(clean, rejects=[*before, *rejects], source=getattr(items, "source", ""), notes=notes)


def repair_text(text: str) -> str:
    """`text` as composed Unicode (NFC) without control, zero-width or unpaired surrogate characters.

    A run of white space becomes one newline where it has any, else one space.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
    if not lines.replace("\n", " ").isprintable():  # a quick test, so that most texts skip the slow loop
        # Cc control, Cf format (zero-width space, BOM, soft hyphen, direction marks), Cs half surrogate pairs.
        lines = "".join(c for c in lines if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    # Composed last: a removed character may have been between a letter and its accent.
    return _LINE_BREAKS.sub("\n", _SPACES.sub(" ", unicodedata.normalize("NFC", lines))).strip()


def prediction_text(text: str, mask: str) -> str:
    """A text without a known price, cleaned as the training texts were by `clean_items` with the same `mask`.

    "prices" masks every mention of money. "own" masks none: the item's own price is unknown, so a mention of it cannot
    be distinguished from others. (A model trained with it has seen mentions of other prices only, and has not learned
    to copy one.)
    """
    repaired = repair_text(text)
    return mask_prices(repaired, MASK)[0] if mask == "prices" else repaired


def text_key(text: str) -> str:
    """The key by which texts count as equal: their words without regard to case and white space."""
    return " ".join(text.casefold().split())


def _masked(text: str, price: float | None, mask: str) -> tuple[str, int]:
    if mask == "prices":
        return mask_prices(text, MASK)
    if mask == "off" or price is None:
        return text, 0
    return mask_prices(text, MASK, only=lambda mentioned: _same_price(mentioned, price))


def _same_price(mentioned: float, price: float) -> bool:
    """Equal to the cent; or one of them in whole dollars, rounded (within 1 %) or without the other's cents."""
    if abs(mentioned - price) < 0.005:
        return True
    if not (mentioned.is_integer() or float(price).is_integer()):
        return False
    return abs(mentioned - price) <= min(0.5, 0.01 * price) or math.floor(mentioned) == math.floor(price)
