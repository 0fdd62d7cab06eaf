"""How the text of an offer is written: a specification sheet, a title, a list, prose, or a private seller's ad.

The sheet is the style of structured sources such as parts databases:

    video-card
    Maravox RX-340
    chipset: Arcon GTX 1660
    memory: 6
    color: Black
"""

from __future__ import annotations

from random import Random

from fastprice.data.synthetic.draw import pick, shuffled, weighted
from fastprice.data.synthetic.words import FILLERS, SELLER_TALK, SHORTHAND

__all__ = ["STYLES", "write_text"]

STYLES = {"sheet": 30.0, "sheet with units": 15.0, "title": 14.0, "list": 14.0, "prose": 14.0, "ad": 13.0}
_KEY_FACTS = 4


def write_text(
    rng: Random,
    *,
    slug: str,
    noun: str,
    brand: str,
    model: str,
    facts: dict[str, str],
    units: dict[str, str],
    colour: str,
    condition: str,
    pieces: int,
    extra: str,
) -> tuple[str, dict[str, str]]:
    """Write one offer in a style drawn by `STYLES`; empty strings (and one piece) are not mentioned.

    Returns the text and the facts that it states. The first four facts are always stated, the others mostly.
    """
    style = weighted(rng, STYLES)
    kept = {
        name: value
        for place, (name, value) in enumerate(facts.items())
        if place < _KEY_FACTS or (style != "title" and rng.random() < 0.85)
    }
    pack = _pack(rng, pieces, bool(extra))
    if style.startswith("sheet"):
        unit_of = units if "units" in style else {}
        lines = [f"{name}: {value} {unit_of.get(name, '')}".rstrip() for name, value in kept.items()]
        lines += [f"color: {colour}"] * bool(colour)
        if rng.random() < 0.3:
            lines = shuffled(rng, lines)
        lines += (
            [f"condition: {condition}"] * bool(condition)
            + [f"quantity: {pieces}"] * (pieces > 1)
            + [f"includes: {extra}"] * bool(extra)
        )
        head = f"{slug}\n{brand} {model}" if "units" not in style else f"{brand} {model} {noun}"
        return "\n".join([head, *lines]), kept
    phrases = [_phrase(name, value, units.get(name, "")) for name, value in kept.items()]
    tail = [words for words in (colour, condition, pack, extra) if words]
    if style == "title":
        return " ".join([f"{brand} {model} {noun}", *phrases[:2], "-", ", ".join([*phrases[2:], *tail])]).rstrip(
            " -"
        ), kept
    if style == "list":
        listed = ", ".join([f"{brand} {model} {noun}", *phrases, *tail])
        return listed + ("" if rng.random() < 0.5 else ". " + _filler(rng, FILLERS)), kept
    if style == "prose":
        return _prose(rng, f"{brand} {model}", noun, phrases, tail), kept
    return _ad(rng, f"{brand} {model} {noun}", phrases, tail), kept


def _prose(rng: Random, name: str, noun: str, phrases: list[str], tail: list[str]) -> str:
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
        sentences.append(_filler(rng, FILLERS))
    if tail:
        sentences.append(pick(rng, ("Offered: ", "This one: ", "You get: ")) + ", ".join(tail) + ".")
    if rng.random() < 0.4:
        sentences.append(_filler(rng, FILLERS))
    return " ".join(sentences)


def _ad(rng: Random, name: str, phrases: list[str], tail: list[str]) -> str:
    parts = [", ".join(phrases), *tail, _filler(rng, SELLER_TALK), _filler(rng, SELLER_TALK)]
    body = pick(rng, (" ... ", ". ", "\n", " - ")).join(shuffled(rng, parts))
    for word, short in SHORTHAND.items():
        if rng.random() < 0.5:
            body = body.replace(word, short)
    text = f"{name}{pick(rng, (' ', chr(10), ': ', ' - '))}{body}"
    manner = rng.random()
    if manner < 0.5:
        return text.lower()
    if manner < 0.6:
        return text.upper()
    return text


def _pack(rng: Random, pieces: int, with_extra: bool) -> str:
    if pieces == 1:
        return ""
    if with_extra:
        return f"set of {pieces}"
    return pick(rng, (f"pack of {pieces}", f"{pieces}-pack", f"set of {pieces}", f"{pieces} pcs", f"lot of {pieces}"))


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
