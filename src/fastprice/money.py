"""Text to price and back. Pure functions on the standard library; every one is linear in the length of its text.

How a number is read (US first, decided once, here):

==================  =========  ===============================================================================
text                price      rule
==================  =========  ===============================================================================
``1,299``           1299       a comma before exactly three digits separates thousands, in any currency
``12,50``, ``0,5``  12.5, 0.5  a comma before one or two digits at the end is a decimal comma
``1.299``           1.299      a single dot is a decimal point ...
``1.299 €``         1299       ... unless a euro sign (or EUR, euros) stands beside it and three digits follow
``1.299.000``       1299000    several dots before groups of three separate thousands
``1.299,99``        1299.99    where both occur, the last one is the decimal sign
``1 299,00``        1299       a space (or no-break, thin space, apostrophe) before exactly three digits groups them
``1.2k``, ``$2m``   1200, 2e6  a glued k; a glued m or a following thousand or million only beside a currency
``99¢``             0.99       cents
``1,2,3``           1          a run that is no single number is read up to where it stops being one
==================  =========  ===============================================================================

A number beside a currency (``$``, ``USD``, ``dollars``, ``bucks``, ``€`` ...) or a seller's phrase (``asking 80``,
``price: 80``, ``80 obo``) is a *mention* of a price. Currencies are recognised and never converted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["PriceMention", "find_prices", "format_price", "mask_prices", "parse_price"]

_SPACE = " \t\u00a0\u2009\u202f"
# One maximal run of digits and separators. Nothing is asked after it, so nothing is ever scanned twice: currencies
# are looked for by short anchored patterns on either side. `\d` takes digits of every script, as float() does.
_RUN = re.compile(
    rf"(?:(?<![\w.])\.)?\d++(?:(?:[.,]|['’{_SPACE}](?=\d{{3}}(?!\d)))\d++)*+(?:[eE][+-]?\d++(?!\w))?",
)
_CODES = "USD|EUR|GBP|CAD|AUD|NZD|CHF|JPY|CNY|INR"
_REACH = 24  # characters before a number in which its currency or phrase may stand
_BEFORE = re.compile(
    rf"(?:(?<![a-z])(?:US|CA|AU|NZ|[UCA]))?[$€£¥₹]{{1,3}}[{_SPACE}]{{0,2}}\Z|(?<![a-z])(?:{_CODES})[{_SPACE}]{{0,2}}[$€£¥₹]?[{_SPACE}]{{0,2}}\Z",
    re.IGNORECASE,
)
_AFTER = re.compile(
    rf"[{_SPACE}]{{0,2}}(?:(?P<sign>[$€£¥₹])(?![{_SPACE}]?\d)|(?P<cents>¢|cents?\b)|(?P<word>(?:{_CODES}|dollars?|bucks?|euros?)\b))",
    re.IGNORECASE,
)
_SCALE = re.compile(rf"(?P<glued>[km])(?![^\W_])|[{_SPACE}]{{0,2}}(?P<word>thousand|million)\b", re.IGNORECASE)
_ASKED = re.compile(
    rf"(?<![a-z])(?:asking|price|priced)(?:[{_SPACE}](?:price|is|of|at|for))?[{_SPACE}]?[:=]?[{_SPACE}]{{0,2}}\Z",
    re.IGNORECASE,
)
_OFFER = re.compile(
    rf"[{_SPACE}]{{0,2}}(?:/[{_SPACE}]?)?(?:obo\b|o\.b\.o|b/o\b|or best offer\b|(?:per|a) month\b|(?<=/)mo(?:nth)?\b)",
    re.IGNORECASE,
)
_MINUS = re.compile(rf"(?<!\w)[-−–](?:[A-Z]{{0,3}}[$€£¥₹])?[{_SPACE}]?\Z")
_FULL_WIDTH = str.maketrans("０１２３４５６７８９＄￥￡．，", "0123456789$¥£.,")
_SCALES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6}


@dataclass(frozen=True, slots=True)
class PriceMention:
    """A price in a text: `text[start:end]` is what to mask, `value` what it says, in its own currency."""

    start: int
    end: int
    value: float


def parse_price(text: str) -> float | None:
    """The first price in a text, finite and above 0, or None when there is none ("free", "0", "N/A", "-5", "nan").

    A number beside a currency wins over any bare number before it: "2 x 8GB kit, $45" is 45. A bare number counts
    unless it is glued to letters ("16GB", "DDR4"), a percentage, or negative; "1.2k" is 1200. Raises TypeError for
    anything but a string.
    """
    plain = _plain(text)
    bare: float | None = None
    for run, mention, value in _numbers(plain):
        if not 0 < value < math.inf:
            continue
        if mention is not None:
            return value
        if bare is None and _stands_alone(plain, run):
            bare = value
    return bare


def format_price(price: float) -> str:
    """The price as people write it: "$1,299.99". Raises ValueError when it is not finite."""
    if not math.isfinite(price):
        raise ValueError(f"a price must be finite, not {price}")
    return f"-${-price:,.2f}" if price < 0 else f"${price:,.2f}"


def find_prices(text: str) -> Iterator[PriceMention]:
    """Every price mentioned as money, in order, without overlaps: beside a currency, or asked ("80 obo")."""
    for _, mention, value in _numbers(_plain(text)):
        if mention is not None and 0 <= value < math.inf:
            yield PriceMention(*mention, value)


def mask_prices(text: str, mask: str = "[price]") -> tuple[str, int]:
    """The text with each mention of money ("$80", "USD 80", "20 bucks", "$1.2k", "€5") replaced, and their number."""
    pieces, done, count = [], 0, 0
    for mention in find_prices(text):
        pieces += [text[done : mention.start], mask]
        done, count = mention.end, count + 1
    return "".join([*pieces, text[done:]]), count


def _plain(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a price is read from a string, not from {type(text).__name__}")
    return text.translate(_FULL_WIDTH)  # one character for one: positions stay those of `text`


def _numbers(text: str) -> Iterator[tuple[re.Match[str], tuple[int, int] | None, float]]:
    """Each number with its span as a mention of money (None for a bare number) and its value (NaN when negative)."""
    used, ranged = 0, -1  # end of the last mention; where a "-" glued to it would let a range go on ("$80-90")
    begin = len(text) - len(text.lstrip())
    for run in _RUN.finditer(text):
        start, end = run.span()
        floor = max(used, start - _REACH)
        before = _BEFORE.search(text, floor, start)
        scale = _SCALE.match(text, end)
        after = _AFTER.match(text, scale.end() if scale else end)
        offer = _OFFER.match(text, scale.end() if scale else end)
        in_word = before is None and _ends_word(text, start)
        unit = not (scale or after or offer) and (text[end : end + 1].isalpha() or text[end : end + 1] == "%")
        money = before is not None or (not in_word and (after is not None or (ranged == start and not unit)))
        asked = not in_word and not unit and bool(offer or _ASKED.search(text, floor, start))
        euro = any("€" in side[0] or "eur" in side[0].lower() for side in (before, after) if side)
        value = _value(run[0], euro=euro)
        if scale and (money or scale["glued"] in ("k", "K")):
            value *= _SCALES[(scale["glued"] or scale["word"]).lower()]
            end = scale.end()
        if after is not None and money:
            value = value / 100 if after["cents"] else value
            end = after.end()
        # Within prose, sellers put a dash before "$80" as a bullet; it is a sign only where the text begins.
        minus = _MINUS.search(text, floor, start)
        if minus and (minus.start() == begin or not (money or asked)):
            value = math.nan
        mention = None
        if money or asked:
            mention = (before.start() if before else start, end)
            used, ranged = end, end + 1 if money and text[end : end + 1] in ("-", "–") else -1
        yield run, mention, value


def _ends_word(text: str, index: int) -> bool:
    """Whether a letter or underscore stands right before `index` ("DDR4"); other scripts need no space ("只要80")."""
    before = text[index - 1 : index]
    return before == "_" or (before.isascii() and before.isalpha())


def _stands_alone(text: str, run: re.Match[str]) -> bool:
    """Whether a bare number may be a price: not part of a word ("DDR4", "16GB") and no percentage."""
    start, end = run.span()
    if _ends_word(text, start):
        return False
    scale = _SCALE.match(text, end)
    if scale and scale["glued"] in ("k", "K"):
        return True
    following = text[end : end + 1]
    return not (following.isalpha() or following in ("%", "_"))


def _value(run: str, *, euro: bool) -> float:
    """What a run of digits and separators says, by the table at the top of this module; inf when it overflows."""
    exponent = re.search(r"[eE]", run)
    digits = run[: exponent.start()] if exponent else run
    tail = run[exponent.start() :] if exponent else ""
    digits = re.sub(rf"['’{_SPACE}]", "", digits)
    marks = [(found.start(), found[0]) for found in re.finditer(r"[.,]", digits)]
    groups = re.split(r"[.,]", digits)
    if not marks:
        return float(digits + tail)
    signs = {mark for _, mark in marks}
    last = marks[-1][1]
    if len(signs) == 2 and all(mark != last for _, mark in marks[:-1]) and _are_thousands(groups[:-1]):
        return float("".join(groups[:-1]) + "." + groups[-1] + tail)
    if len(signs) == 1:
        several = len(marks) > 1
        if (last == "," or several or euro) and _are_thousands(groups):
            return float("".join(groups) + tail)
        if not several and (last == "." or len(groups[1]) <= 2 or groups[0] == "0"):
            return float(f"{groups[0] or '0'}.{groups[1]}{tail}")
    # No single number ("1,2,3", "192.168.1.1"): read its beginning.
    if marks[0][1] == "." and len(marks) > 1:
        return float(f"{groups[0] or '0'}.{groups[1]}")
    return float(groups[0] or "0")


def _are_thousands(groups: list[str]) -> bool:
    first, *rest = groups
    return 1 <= len(first) <= 3 and not first.startswith("0") and all(len(group) == 3 for group in rest)
