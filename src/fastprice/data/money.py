"""Prices in text: parsing, formatting, finding and masking. Every function is linear in the length of its text.

How a number is read (US conventions first):

==================  =========  ===============================================================================
text                price      rule
==================  =========  ===============================================================================
``1,299``           1299       a comma before exactly three digits separates thousands, in any currency
``12,50``, ``0,5``  12.5, 0.5  a comma before one or two digits at the end is a decimal comma
``1.299``           1.299      a single dot is a decimal point ...
``1.299 €``         1299       ... unless a euro sign (or EUR, euros) stands beside it and three digits follow
``1.299.000``       1299000    several dots before groups of three separate thousands
``1.299,99``        1299.99    where both occur, the last one is the decimal mark
``1 299,00``        1299       a space (or no-break, thin space, apostrophe) before exactly three digits groups them
``1.2k``, ``$2m``   1200, 2e6  a glued k; a glued m or a following thousand or million only beside a currency
``99¢``             0.99       cents
``1,2,3``           1          of a run that is not one number, its beginning is read
==================  =========  ===============================================================================

A number beside a currency (``$``, ``USD``, ``dollars``, ``bucks``, ``€`` ...) or a seller's phrase (``asking 80``,
``price: 80``, ``80 obo``) is a *mention* of a price. Currencies are recognized and never converted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["PriceMention", "find_prices", "format_price", "mask_prices", "parse_price"]

# All patterns are applied to lower-case text. (Patterns that ignore case took four times as long.)
_SPACE = " \t\u00a0\u2009\u202f"
_UP_TO_TWO = f"[{_SPACE}]{{0,2}}"
_CURRENCY_SIGNS = "[$€£¥₹]"
_CURRENCY_CODES = "usd|eur|gbp|cad|aud|nzd|chf|jpy|cny|inr"
# One maximal run of digits and separators. No look-ahead follows it, so nothing is scanned twice: currencies are found
# by short anchored patterns on either side. `\d` matches digits of every script, as float() does.
_NUMBER = re.compile(
    rf"(?:(?<![\w.])\.)?\d++(?:(?:[.,]|['’{_SPACE}](?=\d{{3}}(?!\d)))\d++)*+(?:e[+-]?\d++(?!\w))?",
)
_CONTEXT = 24  # characters on either side of a number in which its currency or phrase may be
_CURRENCY_BEFORE = re.compile(
    rf"(?:(?<![a-z])(?:us|ca|au|nz|[uca]))?{_CURRENCY_SIGNS}{{1,3}}{_UP_TO_TWO}\Z"
    rf"|(?<![a-z])(?:{_CURRENCY_CODES}){_UP_TO_TWO}{_CURRENCY_SIGNS}?{_UP_TO_TWO}\Z"
)
_CURRENCY_AFTER = re.compile(
    rf"{_UP_TO_TWO}(?:{_CURRENCY_SIGNS}(?![{_SPACE}]?\d)|(?P<cents>¢|cents?\b)|(?:{_CURRENCY_CODES}|dollars?|bucks?|euros?)\b)"
)
_SCALE = re.compile(rf"(?P<glued>[km])(?![^\W_])|{_UP_TO_TWO}(?P<word>thousand|million)\b")
_PHRASE_BEFORE = re.compile(
    rf"(?<![a-z])(?:asking|price|priced)(?:[{_SPACE}](?:price|is|of|at|for))?[{_SPACE}]?[:=]?{_UP_TO_TWO}\Z"
)
_PHRASE_AFTER = re.compile(
    rf"{_UP_TO_TWO}(?:/[{_SPACE}]?)?(?:obo\b|o\.b\.o|b/o\b|or best offer\b|(?:per|a) month\b|(?<=/)mo(?:nth)?\b)"
)
_MINUS = re.compile(rf"(?<!\w)[-−–](?:[a-z]{{0,3}}{_CURRENCY_SIGNS})?[{_SPACE}]?\Z")
# Wherever one of the above could match, one of these is within `_CONTEXT`: most numbers need no further test.
_HINT = re.compile(
    rf"[$€£¥₹¢]|{_CURRENCY_CODES}|dollar|buck|euro|cent|thousand|million|asking|price|obo|o\.b|b/o|best offer|month|/mo"
)
_FULL_WIDTH = str.maketrans("０１２３４５６７８９＄￥￡．，", "0123456789$¥£.,")
_SCALES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6}


@dataclass(frozen=True, slots=True)
class PriceMention:
    """A price in a text: `text[start:end]` is what to mask, `value` its amount in its own currency."""

    start: int
    end: int
    value: float


def parse_price(text: str) -> float | None:
    """The first price in a text, finite and above 0, or None when there is none ("free", "0", "N/A", "-5", "nan").

    A number beside a currency takes precedence over bare numbers before it: "2 x 8GB kit, $45" is 45. A bare number
    counts unless it is joined to letters ("16GB", "DDR4"), a percentage, or negative; "1.2k" is 1200. Raises TypeError
    for anything but a string.
    """
    plain = _plain(text)
    bare: float | None = None
    for run, mention in _numbers(plain):
        if mention is not None and 0 < mention.value < math.inf:
            return mention.value
        if mention is None and bare is None:
            bare = _bare_price(plain, run)
    return bare


def format_price(price: float) -> str:
    """The price as people write it: "$1,299.99". Raises ValueError when it is not finite."""
    if not math.isfinite(price):
        raise ValueError(f"a price must be finite, not {price}")
    return f"-${-price:,.2f}" if price < 0 else f"${price:,.2f}"


def find_prices(text: str) -> Iterator[PriceMention]:
    """Every mention of money, in order, without overlaps: beside a currency, or in a seller's phrase ("80 obo")."""
    return (mention for _, mention in _numbers(_plain(text)) if mention is not None and 0 <= mention.value < math.inf)


def mask_prices(text: str, mask: str = "[price]", *, only: Callable[[float], bool] | None = None) -> tuple[str, int]:
    """(Text with each mention of money, such as "$80", "USD 80", "20 bucks" or "$1.2k", replaced; their number).

    `only` is called with the value of each mention; None: all are replaced.
    """
    pieces, end, count = [], 0, 0
    for mention in find_prices(text):
        if only is None or only(mention.value):
            pieces += [text[end : mention.start], mask]
            end, count = mention.end, count + 1
    return "".join([*pieces, text[end:]]), count


def _plain(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a price is read from a string, not from {type(text).__name__}")
    # One character for one, so that positions are those of `text`: "İ" alone of all letters becomes two in lower case.
    lower = text.replace("İ", "i").lower()
    return lower if lower.isascii() else lower.translate(_FULL_WIDTH)


def _numbers(text: str) -> Iterator[tuple[re.Match[str], PriceMention | None]]:
    """Each number, with its mention of money (whose value is NaN if negative), or None for a bare number."""
    used, ranged = 0, -1  # end of the last mention; where the second number of a range would begin ("$80-90")
    first = len(text) - len(text.lstrip())
    hints = (hint.start() for hint in _HINT.finditer(text))
    hint = next(hints, math.inf)
    for run in _NUMBER.finditer(text):
        start, end = run.span()
        while hint < start - _CONTEXT:
            hint = next(hints, math.inf)
        if hint > end + _CONTEXT and ranged != start:
            yield run, None
            continue
        floor = max(used, start - _CONTEXT)
        before = _CURRENCY_BEFORE.search(text, floor, start)
        scale = _SCALE.match(text, end)
        after = _CURRENCY_AFTER.match(text, scale.end() if scale else end)
        offer = _PHRASE_AFTER.match(text, scale.end() if scale else end)
        in_word = before is None and _ends_word(text, start)
        unit = not (scale or after or offer) and (text[end : end + 1].isalpha() or text[end : end + 1] == "%")
        money = before is not None or (not in_word and (after is not None or (ranged == start and not unit)))
        phrased = not in_word and not unit and bool(offer or _PHRASE_BEFORE.search(text, floor, start))
        if not (money or phrased):
            yield run, None
            continue
        value = _value(run[0], euro=any("€" in side[0] or "eur" in side[0] for side in (before, after) if side))
        if scale and (money or scale["glued"] == "k"):
            value *= _SCALES[scale["glued"] or scale["word"]]
            end = scale.end()
        if after is not None and money:
            value = value / 100 if after["cents"] else value
            end = after.end()
        # Sellers write a dash before "$80" as a bullet; it is a sign only at the beginning of the text.
        minus = _MINUS.search(text, floor, start)
        if minus and minus.start() == first:
            value = math.nan
        used, ranged = end, end + 1 if money and text[end : end + 1] in ("-", "–") else -1
        yield run, PriceMention(before.start() if before else start, end, value)


def _bare_price(text: str, run: re.Match[str]) -> float | None:
    """A bare number as a price; None for part of a word ("DDR4-3200", "16GB"), a percentage, or a value not above 0."""
    start, end = run.span()
    hyphened = text[start - 1 : start] in ("-", "–") and text[max(0, start - 2) : start - 1].isalnum()
    if hyphened or _ends_word(text, start) or _MINUS.search(text, max(0, start - _CONTEXT), start):
        return None
    scale = _SCALE.match(text, end)
    thousands = scale is not None and scale["glued"] == "k"
    if not thousands and (text[end : end + 1].isalpha() or text[end : end + 1] in ("%", "_")):
        return None
    value = _value(run[0], euro=False) * (1e3 if thousands else 1)
    return value if 0 < value < math.inf else None


def _ends_word(text: str, index: int) -> bool:
    """Whether a letter or underscore is right before `index` ("DDR4"); other scripts need no space ("只要80")."""
    before = text[max(0, index - 1) : index]
    return before == "_" or (before.isascii() and before.isalpha())


def _value(run: str, *, euro: bool) -> float:
    """The value of a run of digits and separators, by the table at the top of this module; inf on overflow."""
    digits, e, exponent = re.sub(rf"['’{_SPACE}]", "", run).partition("e")
    tail = e + exponent
    marks = re.findall(r"[.,]", digits)
    groups = re.split(r"[.,]", digits)
    if not marks:
        return float(digits + tail)
    signs, last = set(marks), marks[-1]
    if len(signs) == 2 and last not in marks[:-1] and _are_thousands(groups[:-1]):
        return float("".join(groups[:-1]) + "." + groups[-1] + tail)
    if len(signs) == 1:
        several = len(marks) > 1
        if (last == "," or several or euro) and _are_thousands(groups):
            return float("".join(groups) + tail)
        if not several and (last == "." or len(groups[1]) <= 2 or groups[0] == "0"):
            return float(f"{groups[0] or '0'}.{groups[1]}{tail}")
    # Not one number ("1,2,3", "192.168.1.1"): its beginning is read.
    if marks[0] == ".":
        return float(f"{groups[0] or '0'}.{groups[1]}")
    return float(groups[0] or "0")


def _are_thousands(groups: list[str]) -> bool:
    first, *rest = groups
    return 1 <= len(first) <= 3 and not first.startswith("0") and all(len(group) == 3 for group in rest)
