"""How the text of an offer is written: a specification sheet, a title, a list, prose, or a private seller's ad.

The sheet is the style of structured sources such as parts databases:

    video-card
    Maravox RX-340
    chipset: Arcon GTX 1660
    memory: 6
    color: Black
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from fastprice.data.synthetic.random_draws import pick, pick_weighted, shuffled
from fastprice.data.synthetic.words import FILLER_SENTENCES, SELLER_PHRASES, SELLER_SPELLINGS

__all__ = ["STYLES", "OfferDetails", "write_text"]

# Style to its relative frequency.
STYLES = {"sheet": 30.0, "sheet with units": 15.0, "title": 14.0, "list": 14.0, "prose": 14.0, "ad": 13.0}
_KEY_FACTS = 4


@dataclass(frozen=True, slots=True)
class OfferDetails:
    """What the text of an offer may state; empty strings and a quantity of one are not mentioned.

    `facts` maps attribute names to values without units, `units` the names of measured attributes to units.
    """

    slug: str
    noun: str
    brand: str
    model: str
    facts: dict[str, str]
    units: dict[str, str]
    color: str
    condition: str
    quantity: int
    extra: str


def write_text(rng: Random, offer: OfferDetails) -> tuple[str, dict[str, str]]:
    """(Text, facts that it states) of an offer, in a style drawn from `STYLES`.

    The first four facts are always stated, each of the others mostly.
    """
    style = pick_weighted(rng, STYLES)
    stated = {
        name: value
        for place, (name, value) in enumerate(offer.facts.items())
        if place < _KEY_FACTS or (style != "title" and rng.random() < 0.85)
    }
    pack = _pack(rng, offer.quantity, bool(offer.extra))
    if style.startswith("sheet"):
        return _sheet(rng, offer, stated, with_units="units" in style), stated
    name = f"{offer.brand} {offer.model}"
    phrases = [_phrase(fact, value, offer.units.get(fact, "")) for fact, value in stated.items()]
    details = [words for words in (offer.color, offer.condition, pack, offer.extra) if words]
    if style == "title":
        title = " ".join([f"{name} {offer.noun}", *phrases[:2], "-", ", ".join([*phrases[2:], *details])])
        return title.rstrip(" -"), stated
    if style == "list":
        listed = ", ".join([f"{name} {offer.noun}", *phrases, *details])
        return listed + ("" if rng.random() < 0.5 else ". " + _filler(rng, FILLER_SENTENCES)), stated
    if style == "prose":
        return _prose(rng, name, offer.noun, phrases, details), stated
    return _ad(rng, f"{name} {offer.noun}", phrases, details), stated


def _sheet(rng: Random, offer: OfferDetails, stated: dict[str, str], *, with_units: bool) -> str:
    units = offer.units if with_units else {}
    lines = [f"{name}: {value} {units.get(name, '')}".rstrip() for name, value in stated.items()]
    lines += [f"color: {offer.color}"] * bool(offer.color)
    if rng.random() < 0.3:
        lines = shuffled(rng, lines)
    lines += (
        [f"condition: {offer.condition}"] * bool(offer.condition)
        + [f"quantity: {offer.quantity}"] * (offer.quantity > 1)
        + [f"includes: {offer.extra}"] * bool(offer.extra)
    )
    name = f"{offer.brand} {offer.model}"
    title = f"{name} {offer.noun}" if with_units else f"{offer.slug}\n{name}"
    return "\n".join([title, *lines])


def _prose(rng: Random, name: str, noun: str, phrases: list[str], details: list[str]) -> str:
    opening = pick(
        rng,
        (
            f"{name}, {noun} with {phrases[0]} and {phrases[1]}.",
            f"Meet the {name} {noun}, offering {phrases[0]} and {phrases[1]}.",
            f"The {name} {noun} comes with {phrases[0]} and {phrases[1]}.",
        ),
    )
    sentences = [opening]
    if phrases[2:]:
        sentences.append(pick(rng, ("It also has ", "Further: ", "Specifications: ")) + ", ".join(phrases[2:]) + ".")
    if rng.random() < 0.6:
        sentences.append(_filler(rng, FILLER_SENTENCES))
    if details:
        sentences.append(pick(rng, ("Offered: ", "This one: ", "You get: ")) + ", ".join(details) + ".")
    if rng.random() < 0.4:
        sentences.append(_filler(rng, FILLER_SENTENCES))
    return " ".join(sentences)


def _ad(rng: Random, name: str, phrases: list[str], details: list[str]) -> str:
    parts = [", ".join(phrases), *details, _filler(rng, SELLER_PHRASES), _filler(rng, SELLER_PHRASES)]
    body = pick(rng, (" ... ", ". ", "\n", " - ")).join(shuffled(rng, parts))
    for word, spelling in SELLER_SPELLINGS.items():
        if rng.random() < 0.5:
            body = body.replace(word, spelling)
    text = f"{name}{pick(rng, (' ', chr(10), ': ', ' - '))}{body}"
    case = rng.random()
    if case < 0.5:
        return text.lower()
    if case < 0.6:
        return text.upper()
    return text


def _pack(rng: Random, count: int, with_extra: bool) -> str:
    if count == 1:
        return ""
    if with_extra:
        return f"set of {count}"
    return pick(rng, (f"pack of {count}", f"{count}-pack", f"set of {count}", f"{count} pcs", f"lot of {count}"))


def _phrase(name: str, value: str, unit: str) -> str:
    """An attribute as words: "16 GB memory", "gold efficiency", "2600 rpm", "wifi", "no wifi"."""
    if value in ("yes", "no"):
        return name if value == "yes" else f"no {name}"
    if value == "none":
        return f"no {name}"
    if not unit or any(word.startswith(unit.lower()) for word in name.split() if len(unit) > 1):
        return f"{value} {name}"
    return f"{value} {unit} {name}"


def _filler(rng: Random, sentences: tuple[str, ...]) -> str:
    return pick(rng, sentences).replace("{}", str(2 + int(rng.random() ** 2 * 60)))
