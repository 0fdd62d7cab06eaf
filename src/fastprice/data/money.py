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
``price: 80``, ``80 obo``) is a *mention* of a price. Currencies are recognized and never converted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["PriceMention", "find_prices", "format_price", "mask_prices", "parse_price"]

# All patterns meet lower-case text. (Ignoring case in them instead took four times as long.)
_SPACE = " \t\u00a0\u2009\u202f"
_UP_TO_TWO = f"[{_SPACE}]{{0,2}}"
_SIGNS = "[$€£¥₹]"
_CODES = "usd|eur|gbp|cad|aud|nzd|chf|jpy|cny|inr"
# One maximal run of digits and separators. Nothing is asked after it, so nothing is ever scanned twice: currencies
# are looked for by short anchored patterns on either side. `\d` takes digits of every script, as float() does.
_RUN = re.compile(
    rf"(?:(?<![\w.])\.)?\d++(?:(?:[.,]|['’{_SPACE}](?=\d{{3}}(?!\d)))\d++)*+(?:e[+-]?\d++(?!\w))?",
)
_REACH = 24  # characters on either side of a number in which its currency or phrase may stand
_BEFORE = re.compile(
    rf"(?:(?<![a-z])(?:us|ca|au|nz|[uca]))?{_SIGNS}{{1,3}}{_UP_TO_TWO}\Z"
    rf"|(?<![a-z])(?:{_CODES}){_UP_TO_TWO}{_SIGNS}?{_UP_TO_TWO}\Z"
)
_AFTER = re.compile(
    rf"{_UP_TO_TWO}(?:{_SIGNS}(?![{_SPACE}]?\d)|(?P<cents>¢|cents?\b)|(?:{_CODES}|dollars?|bucks?|euros?)\b)"
)
_SCALE = re.compile(rf"(?P<glued>[km])(?![^\W_])|{_UP_TO_TWO}(?P<word>thousand|million)\b")
_ASKED = re.compile(
    rf"(?<![a-z])(?:asking|price|priced)(?:[{_SPACE}](?:price|is|of|at|for))?[{_SPACE}]?[:=]?{_UP_TO_TWO}\Z"
)
_OFFER = re.compile(
    rf"{_UP_TO_TWO}(?:/[{_SPACE}]?)?(?:obo\b|o\.b\.o|b/o\b|or best offer\b|(?:per|a) month\b|(?<=/)mo(?:nth)?\b)"
)
_MINUS = re.compile(rf"(?<!\w)[-−–](?:[a-z]{{0,3}}{_SIGNS})?[{_SPACE}]?\Z")
# Wherever one of the above could match, one of these stands within reach: most numbers are spared the closer look.
_HINT = re.compile(
    rf"[$€£¥₹¢]|{_CODES}|dollar|buck|euro|cent|thousand|million|asking|price|obo|o\.b|b/o|best offer|month|/mo"
)
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
    """Every price mentioned as money, in order, without overlaps: beside a currency, or asked ("80 obo")."""
    return (mention for _, mention in _numbers(_plain(text)) if mention is not None and 0 <= mention.value < math.inf)


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
    # One character for one, so that positions stay those of `text`: of all letters "İ" alone grows in lower case.
    lower = text.replace("İ", "i").lower()
    return lower if lower.isascii() else lower.translate(_FULL_WIDTH)


def _numbers(text: str) -> Iterator[tuple[re.Match[str], PriceMention | None]]:
    """Each number, with what it is as a mention of money (its value NaN when negative), or None for a bare number."""
    used, ranged = 0, -1  # end of the last mention; where a "-" glued to it would let a range go on ("$80-90")
    begin = len(text) - len(text.lstrip())
    hints = (hint.start() for hint in _HINT.finditer(text))
    hint = next(hints, math.inf)
    for run in _RUN.finditer(text):
        start, end = run.span()
        while hint < start - _REACH:
            hint = next(hints, math.inf)
        if hint > end + _REACH and ranged != start:
            yield run, None
            continue
        floor = max(used, start - _REACH)
        before = _BEFORE.search(text, floor, start)
        scale = _SCALE.match(text, end)
        after = _AFTER.match(text, scale.end() if scale else end)
        offer = _OFFER.match(text, scale.end() if scale else end)
        in_word = before is None and _ends_word(text, start)
        unit = not (scale or after or offer) and (text[end : end + 1].isalpha() or text[end : end + 1] == "%")
        money = before is not None or (not in_word and (after is not None or (ranged == start and not unit)))
        asked = not in_word and not unit and bool(offer or _ASKED.search(text, floor, start))
        if not (money or asked):
            yield run, None
            continue
        value = _value(run[0], euro=any("€" in side[0] or "eur" in side[0] for side in (before, after) if side))
        if scale and (money or scale["glued"] == "k"):
            value *= _SCALES[scale["glued"] or scale["word"]]
            end = scale.end()
        if after is not None and money:
            value = value / 100 if after["cents"] else value
            end = after.end()
        # Within prose, sellers put a dash before "$80" as a bullet; it is a sign only where the text begins.
        minus = _MINUS.search(text, floor, start)
        if minus and minus.start() == begin:
            value = math.nan
        used, ranged = end, end + 1 if money and text[end : end + 1] in ("-", "–") else -1
        yield run, PriceMention(before.start() if before else start, end, value)


def _bare_price(text: str, run: re.Match[str]) -> float | None:
    """A bare number as a price; None for part of a word ("DDR4-3200", "16GB"), a percentage, or what is not above 0."""
    start, end = run.span()
    hyphened = text[start - 1 : start] in ("-", "–") and text[max(0, start - 2) : start - 1].isalnum()
    if hyphened or _ends_word(text, start) or _MINUS.search(text, max(0, start - _REACH), start):
        return None
    scale = _SCALE.match(text, end)
    thousands = scale is not None and scale["glued"] == "k"
    if not thousands and (text[end : end + 1].isalpha() or text[end : end + 1] in ("%", "_")):
        return None
    value = _value(run[0], euro=False) * (1e3 if thousands else 1)
    return value if 0 < value < math.inf else None


def _ends_word(text: str, index: int) -> bool:
    """Whether a letter or underscore stands right before `index` ("DDR4"); other scripts need no space ("只要80")."""
    before = text[max(0, index - 1) : index]
    return before == "_" or (before.isascii() and before.isalpha())


def _value(run: str, *, euro: bool) -> float:
    """What a run of digits and separators says, by the table at the top of this module; inf when it overflows."""
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
    # No single number ("1,2,3", "192.168.1.1"): read its beginning.
    if marks[0] == ".":
        return float(f"{groups[0] or '0'}.{groups[1]}")
    return float(groups[0] or "0")


def _are_thousands(groups: list[str]) -> bool:
    first, *rest = groups
    return 1 <= len(first) <= 3 and not first.startswith("0") and all(len(group) == 3 for group in rest)
