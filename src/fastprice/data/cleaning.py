"""Cleaning of items before they are split: broken text, price range, leaked labels, exact duplicates.

In that order, and nothing vanishes: each row taken out becomes a `Reject` behind those that loading made. Texts that
are equal at different prices stay, since both are true; `splitting` keeps them in one part. Near-duplicates stay for
the same reason.

A label leak is the item's own price written in its text, as a quarter of classified advertisements do ("$80 obo" at a
price of 80). A model trained on it learns to copy instead of to estimate. What counts as written is what
`money.find_prices` finds: a number beside a currency or a seller's phrase. A bare number that happens to equal the
price ("R7 370" at $370) is left alone, and so is a price spelt out in words.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fastprice.data.items import Item, Items, Reject
from fastprice.data.money import find_prices, format_price, mask_prices
from fastprice.errors import ConfigError

__all__ = ["MASK", "clean_items", "prediction_text", "repair_text", "text_key"]

MASK = "[price]"
_BLANKS = re.compile(r"[^\S\n]+")
_LINES = re.compile(r" ?\n[ \n]*")
_SHOWN = 200


def clean_items(
    items: Sequence[Item],
    *,
    min_price: float = 0.50,
    max_price: float = 999.49,
    min_chars: int = 3,
    mask: Literal["prices", "own", "off"] = "own",
) -> Items:
    """The items worth learning from, in their order, with repaired and masked texts.

    min_price, max_price: the dollars an item may cost, both ends included; items without a price (for prediction)
    pass. min_chars: the least number of characters a text has besides masks. mask: "own" replaces the item's own price
    by "[price]" (to the cent, or in whole dollars where the other has cents), "prices" every mention of money, "off"
    nothing. Rejects and notes of `items` are kept and added to. Raises ConfigError for impossible settings.
    """
    if mask not in ("prices", "own", "off"):
        raise ConfigError(f"mask: {mask!r} is none of 'prices', 'own' and 'off'")
    if not 0 <= min_price <= max_price:
        raise ConfigError(f"min_price {min_price} and max_price {max_price}: need 0 <= min_price <= max_price")
    rejects: list[Reject] = []
    kept: list[Item] = []
    first_seen: dict[tuple[str, float | None], Item] = {}
    masked = masked_texts = 0

    def reject(item: Item, reason: str) -> None:
        rejects.append(Reject(item.row, reason, item.text[:_SHOWN]))

    for item in items:
        if item.price is not None and not min_price <= item.price <= max_price:
            reject(item, f"price {item.price:,.2f} is not within {format_price(min_price)} to {max_price:,.2f}")
            continue
        text, count = _masked(repair_text(item.text), item.price, mask)
        if len(text.replace(MASK, "").strip()) < min_chars:
            reject(item, f"text shorter than {min_chars} characters")
            continue
        clean = replace(item, text=text)
        first = first_seen.setdefault((text_key(text), item.price), clean)
        if first is not clean:
            reject(item, "duplicate of " + (f"row {first.row}" if first.row is not None else "an earlier item"))
            continue
        masked, masked_texts = masked + count, masked_texts + bool(count)
        kept.append(clean)
    notes = list(items.notes) if isinstance(items, Items) else []
    if masked:
        notes.append(f"masked {masked:,} prices in {masked_texts:,} texts")
    before = items.rejects if isinstance(items, Items) else []
    return Items(kept, rejects=[*before, *rejects], source=getattr(items, "source", ""), notes=notes)


def repair_text(text: str) -> str:
    """Composed Unicode (NFC) without control, zero-width or unpaired surrogate characters, its white space collapsed.

    Newlines stay, one at a time; every other run of white space becomes one space.
    """
    kept = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
    if not kept.replace("\n", " ").isprintable():  # a quick look that spares most texts the slow one
        # Cc control, Cf format (zero-width space, BOM, soft hyphen, direction marks), Cs half surrogate pairs.
        kept = "".join(c for c in kept if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    # Composed last: a character taken out may have stood between a letter and its accent.
    return _LINES.sub("\n", _BLANKS.sub(" ", unicodedata.normalize("NFC", kept))).strip()


def prediction_text(text: str, mask: str) -> str:
    """A text without a known price as `clean_items` leaves the texts it was trained on, given its `mask`.

    "prices" masks every mention of money. "own" masks none: the item's own price is what is asked for, so a mention of
    it cannot be told from others. (A model trained so has seen mentions of other prices only, and has had no reason to
    copy one.)
    """
    repaired = repair_text(text)
    return mask_prices(repaired, MASK)[0] if mask == "prices" else repaired


def text_key(text: str) -> str:
    """What two texts share when they count as equal: the same words, whatever their case and white space."""
    return " ".join(text.casefold().split())


def _masked(text: str, price: float | None, mask: str) -> tuple[str, int]:
    if mask == "off" or (mask == "own" and price is None):
        return text, 0
    pieces, done, count = [], 0, 0
    for mention in find_prices(text):
        if mask == "own" and price is not None and not _same_price(mention.value, price):
            continue
        pieces += [text[done : mention.start], MASK]
        done, count = mention.end, count + 1
    return "".join([*pieces, text[done:]]), count


def _same_price(written: float, price: float) -> bool:
    """To the cent; or one of them in whole dollars, rounded (within 1 %) or with the other's cents cut off."""
    if abs(written - price) < 0.005:
        return True
    if not (written.is_integer() or float(price).is_integer()):
        return False
    return abs(written - price) <= min(0.5, 0.01 * price) or math.floor(written) == math.floor(price)
